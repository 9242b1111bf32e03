"""A round whose sum nodes began to reveal, and that wasn't opened: it is tried again over the same nodes, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.federation import clients, plan, run
from tests.plain_sums import BOUNDED, models, of_history
from tests.server.test_machine import feed, joined, of, update
from tests.server.test_retention import replayed
from typer.testing import CliRunner

from atoll.cli import app, look  # noqa: F401  it adds itself
from atoll.errors import GaveUpError
from atoll.keys import Identity
from atoll.messages import UPDATE, StartTraining
from atoll.node import events as node_events
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.privacy.secagg import node as masking
from atoll.privacy.secagg.packing import pack_table, unpack_table
from atoll.privacy.secagg.terms import SHARES
from atoll.server import events, machine
from atoll.server.runtime import Server
from atoll.server.state import Phase, State, waiting_for
from atoll.stopping import Course
from atoll.wire import Address

STEPS = events.Steps(("keys",), ("survivors", "unmask"), gives="unmask")
FOUR = frozenset(joined(4).nodes)


def answered(state: State, phase: str) -> State:
    said = (events.Answered(1.0, Address("run", state.round, state.attempt, node), phase) for node in FOUR)
    return feed(state, *said, events.Collected(1.0, phase, FOUR))[0]


def burnt() -> tuple[State, list[events.Command]]:
    agreed = plan(plan={"rounds": 2}, cohort={"minimum": 4, "quorum": 0.7, "deadline": 20})
    state, _ = feed(machine.begin("run", agreed, "model-0", 0.0, steps=STEPS)[0], joined(4), joined(5))
    assert set(state.cohort) == FOUR
    state = answered(state, "keys")
    state, _ = feed(state, *(update(state, node) for node in FOUR), events.Collected(1.0, UPDATE, FOUR))
    assert not state.sealed
    state = answered(state, "survivors")
    assert state.sealed == FOUR
    return feed(state, events.Abandoned(2.0, "the seed of node x can't be had"))


def test_the_next_try_is_of_the_same_nodes_and_all_of_them():
    state, commands = burnt()
    (asked,) = of(events.Train, commands)
    assert (set(asked.nodes), asked.attempt) == (FOUR, 2)
    gone, *here = sorted(FOUR)
    keys = (events.Answered(3.0, Address("run", 1, 2, node), "keys") for node in here)
    state, commands = feed(state, *keys, events.Tick(10.0))
    assert not of(events.Collect, commands), "a quorum isn't enough"
    state, commands = feed(state, events.Declined(11.0, Address("run", 1, 2, gone), "no"))
    assert state.attempt == 3


def test_it_waits_for_who_is_away_and_says_how_to_go_on_without():
    state, _ = burnt()
    gone, *here = sorted(FOUR)
    keys = (events.Answered(3.0, Address("run", 1, 2, node), "keys") for node in here)
    lost = events.Lost(3.0, gone), events.Declined(3.5, Address("run", 1, 2, gone), "it was started again")
    state, commands = feed(state, *lost, *keys)
    assert state.phase is Phase.WAITING
    assert not of(events.Train, commands)
    assert f"its sum can only be made over the same 4 nodes, and {state.names[gone]} can't be asked" in waiting_for(state, 4.0)
    assert set(of(events.Train, feed(state, events.Joined(5.0, {gone: state.names[gone]}))[1])[0].nodes) == FOUR
    state, _ = feed(state, events.Tick(100.0))
    assert state.outcome == "gave_up"
    assert "can't be asked; they reveal no sum over other nodes from this model" in state.reason
    assert "`atoll serve --start last.safetensors` with another plan.seed" in state.reason


def test_the_next_round_is_of_whoever_is_here():
    state, _ = burnt()
    state = answered(state, "keys")
    state, _ = feed(state, *(update(state, node) for node in FOUR), events.Collected(1.0, UPDATE, FOUR))
    state = answered(state, "survivors")
    given = (events.Answered(4.0, Address("run", 1, 2, node), "unmask") for node in FOUR)
    state, commands = feed(state, *given)
    assert of(events.Close, commands)
    state, commands = feed(state, events.Closed(5.0, "model-1", {}))
    assert not state.sealed
    assert len(of(events.Train, commands)[0].nodes) == 5


@pytest.mark.parametrize("sealed", [(), tuple(FOUR)])
def test_another_server_knows_of_it(sealed):
    past = events.Past(0, 2, {}, joined(5).nodes, "model-0", Course(), (), sealed=sealed)
    agreed = plan(plan={"rounds": 2}, cohort={"minimum": 4, "deadline": 20})
    state, _ = machine.resume("run", agreed, past, 0.0, steps=STEPS)
    _, commands = feed(state, joined(5))
    assert len(of(events.Train, commands)[0].nodes) == (4 if sealed else 5)


class Refusing(Node):
    """A node that trains once all are here, and in some tries of the second round doesn't unmask."""

    here: asyncio.Event
    refuses: Collection[int] = ()

    async def start_training(self, task: StartTraining) -> None:
        await self.here.wait()
        await super().start_training(task)

    async def _answer(self, command: node_events.Answer) -> None:
        if (command.task.round, command.phase) == (2, "unmask") and command.task.attempt in self.refuses:
            await self.drive.happen(node_events.CannotTrain(self.drive.now(), command.task, "away for a moment"))
        else:
            await super()._answer(command)


def together(place: Path, refuses: Sequence[Collection[int]]) -> tuple[Plan, Any]:
    """Run four nodes, each of which refuses to unmask in some tries of round 2; return the plan, and history or error."""
    agreed = plan(plan={"rounds": 3}, privacy=BOUNDED, cohort={"minimum": 3, "quorum": 1.0, "deadline": 30})

    async def all_of_them() -> Any:
        names, here = set[str](), asyncio.Event()

        def watch(event: Mapping[str, Any]) -> None:
            names.update([event["name"]] if event["what"] == "joined" else [])
            if len(names) == len(refuses):
                here.set()

        server = Server(agreed, store=place / "store", port=0, watch=watch)
        nodes = [Refusing(server.url, one, name=name, directory=place / name) for name, one in clients(4).items()]
        for node, tries in zip(nodes, refuses, strict=True):
            node.here, node.refuses = here, tries
        served, *_ = await asyncio.gather(server.serve_async(), *(one.start_async() for one in nodes), return_exceptions=True)
        return served

    return agreed, asyncio.run(asyncio.wait_for(all_of_them(), 60))


def test_a_sum_that_too_few_unmasked_is_made_again_when_they_are_back(tmp_path):
    agreed, history = together(tmp_path, [(), (), {1}, {1}])
    assert history["outcome"] == "completed", history["reason"]
    assert [(row["attempt"], len(row["answered"])) for row in history["rounds"]][1:] == [(2, 4), (1, 4)]
    found = replayed(tmp_path / "store", history["run"])
    assert found == models(agreed, clients(4), of_history(tmp_path / "store", history))


def test_a_node_that_spoils_its_shares_ends_the_run_and_is_named_with_the_mend(tmp_path, monkeypatch):
    share = masking.share

    def spoilt(state: Any, message: bytes) -> Any:
        after, table = share(state, message)
        if state.terms.round != 2 or state.record.node != spoiler:
            return after, table
        rows = unpack_table(table, SHARES, len(after.cohort.records))
        return after, pack_table({place: bytes(SHARES) for place in rows})

    monkeypatch.setattr(masking, "share", spoilt)
    spoiler = Identity.at(tmp_path / "node-3" / "node.key").node
    _, served = together(tmp_path, [(), (), (), range(9)])
    assert isinstance(served, GaveUpError)
    assert f"the seed of node {spoiler}, which dropped out, can't be had" in str(served)
    assert "with another plan.seed" in str(served)
    monkeypatch.undo()
    last = tmp_path / "last.safetensors"
    exported = CliRunner().invoke(app, ["export", "--which", "last", "--store", str(tmp_path / "store"), "--to", str(last)])
    assert exported.exit_code == 0, exported.output
    agreed = plan(plan={"rounds": 2, "seed": 2}, privacy=BOUNDED)
    history = run(agreed, clients(3), tmp_path, start=last)  # in the same directories, with the same ledgers
    assert (history["outcome"], len(history["rounds"])) == ("completed", 2)
