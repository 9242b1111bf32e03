"""The newest state of a run's method: how the next one is made of a round's updates, judged, and kept as files."""

from __future__ import annotations

from collections.abc import Sequence

from atoll import algorithms, method
from atoll.algorithms import State
from atoll.algorithms.drift import Drift, drift
from atoll.errors import StoreError
from atoll.learner import Rows
from atoll.server.agreed import Agreed
from atoll.server.book import Made
from atoll.server.close import Accepted, Guard, Undo, close
from atoll.server.events import Close
from atoll.store.models import Models
from atoll.vector import Groups, Metrics, layouts_of


class Aggregator:
    """What the server has of the model.

    Args:
        agreed: the plan, and what it comes to.
        models: where states and models are kept.
        holdout: the server's own test rows.
        noises: what the closed rounds' noise was made of; whoever closes another one adds its own.

    Attributes:
        state: the newest; views into its file, which cost no memory.
        kept: the digests of the model in it, and of the state.
    """

    state: State
    kept: tuple[str, str]
    _given: Groups | None
    """The model that nodes have, where they get to the next one by steps."""

    def __init__(self, agreed: Agreed, models: Models, holdout: Rows | None, noises: Sequence[method.Made] = ()) -> None:
        self._plan, self._algorithm, self._learner = agreed.plan, agreed.algorithm, agreed.learner
        self._press, self._down = agreed.press, agreed.down
        self._protected, self._account = agreed.layouts, agreed.account
        self._models, self._holdout, self.noises = models, holdout, list(noises)

    def begin(self, first: Groups) -> str:
        """Store a run's first model, and return its digest; the first state is made of it as nodes receive it."""
        state = self._algorithm.init(first)
        if not self._down.small:
            return self._put(state, self._algorithm.brief(state))[0]
        model = self._models.put(*self._down.file(self._algorithm.brief(state)))
        self.take_up(state, model, model)
        return model

    def keep(self, state: State, round_: int) -> tuple[str, str]:
        """Store a state and the model that a round made of it, and go on with it; return both digests."""
        return self._put(state, *self._down.next(self._algorithm.brief(state), self._given, round_), round_)

    def _put(self, state: State, given: Groups, step: Groups | None = None, round_: int = 0) -> tuple[str, str]:
        """Store it all, and only then go on with it: what a full disk breaks off is done again from the state before."""
        model = self._models.put(*self._down.file(given))
        if step:
            self._models.put_step(self.kept[0], model, step, {"round": str(round_)})
        kept = model if given.keys() == state.keys() and not self._down.press.stages else self._models.put(state)
        self.state, self.kept = self._models.get(kept, layouts_of(state)), (model, kept)
        self._given = self._models.get(model, layouts_of(given)) if self._down.steps else None
        return self.kept

    def take_up(self, like: State, model: str, state: str) -> None:
        """Go on with a state that another server left, which is laid out like this one."""
        self.state, self.kept = like, (model, state)
        brief = self._algorithm.brief(like)
        if model == state and (self._down.small or brief.keys() != like.keys()):  # the run's first
            received = self.received()
            self.state = self._algorithm.init({name: received[name] for name in self._learner.layouts})
        else:
            self.state = self._models.get(state, layouts_of(like))
        self._given = self._models.get(model, layouts_of(brief)) if self._down.steps else None

    def keep_again(self) -> None:
        """Store the newest state once more, where it was pruned with the run that made it first.

        Raises:
            StoreError: it is a compressed run's first model, of which only what nodes make of it is left.
        """
        if not self._models.has(*self.kept):
            if self._down.small and self.kept[0] == self.kept[1]:
                raise StoreError(f"model {self.kept[0][:12]} was pruned while the run began with it; start the run again")
            self._put(self.state, self._given or self._algorithm.brief(self.state))

    def received(self) -> Groups:
        """Return the present model as nodes have it."""
        layouts = layouts_of(self._algorithm.brief(self.state))
        return self._down.received(self._models.get(self.kept[0], self._down.layouts(layouts)), layouts)

    def aggregate(self, command: Close, accepted: Sequence[Accepted], model: str, guard: Guard | None = None) -> Made:
        """Fold accepted updates into the next state, and store it; `model` and `guard` as in `close`."""
        here = method.Round(command.round, command.attempt, command.cohort, command.registered, len(command.accepted))
        noise = method.noise(self._plan, self._account, here, self.noises)
        made = self._fold(command, accepted, model, guard, method.noised(self._plan, self._protected, noise))
        return made._replace(noise=noise, epsilon=method.spent(self._account, [*self.noises, noise]))

    def spent(self) -> float | None:
        """Return ε so far; None where no noise bounds it, or each node's own is known to it alone."""
        return method.spent(self._account, self.noises)

    def over(self) -> str:
        """Say why there can be no further round by what the noise promises, or nothing where there can."""
        return method.over(self._account, self.noises)

    def _fold(self, command: Close, accepted: Sequence[Accepted], model: str, guard: Guard | None, undo: Undo | None) -> Made:
        own = algorithms.reference(self._plan, self._algorithm, self._learner, self.state, self._holdout, command.round)
        reference = self._models.put(own) if own else ""
        layouts = self._learner.layouts
        if own:  # from its file, where it costs no memory
            own = self._models.get(reference, self._algorithm.updates(layouts))
        seen: list[Drift | None] = []
        # A guard hides what they are; and beside noise, whatever else is told of them would say more than the noise allows.
        see = None if guard or undo else lambda bodies, weights: seen.append(drift(bodies, weights))
        whole = self._algorithm, self.state, layouts, model, accepted, command.registered, own
        state = close(*whole, guard=guard, undo=undo, press=self._press, see=see)
        if taught := algorithms.taught(
            self._plan, self._algorithm, self._learner, self.state, state, self._holdout, command.round
        ):
            reference = self._models.put(taught)
            state = close(*whole[:-1], taught, guard=guard, undo=undo, press=self._press)
        return Made(*self.keep(state, command.round), reference, drift=seen[0] if seen else None)

    def evaluate(self) -> Metrics | None:
        """Judge the present model on the holdout; None without one."""
        if not self._holdout:
            return None
        model = self.received()
        return self._learner.evaluate({name: model[name] for name in self._learner.layouts}, self._holdout)
