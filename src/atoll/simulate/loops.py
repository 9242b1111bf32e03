"""The loops of strategies `scan` and `vmap`: a learner's pure functions → one function over many clients, for `jax.jit`.

Both take `(count, flats, owns, x, y, masks, steps)`: flat vectors of the model, for all the same (`shared`) or
`[clients, parameters]`; what each client drew; rows `[clients, steps, batch, …]`; masks `[clients, steps, batch]` or None;
how many steps each client goes. They return the fitted flat vectors `[clients, parameters]` and the losses `[clients]`.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from atoll.learner import How, Pure, Together

_UNROLL = 2
"""Steps written out one after the other in a loop's body: 4 or 5 gain another 2 % at most, and take twice as long to compile."""


def _at(tree: Any, place: Any) -> Any:
    return jax.tree.map(lambda array: array[place], tree)


def scan(pure: Pure, shared: bool, even: int) -> Callable[..., Any]:
    """Return what fits `count` clients one after the other; `even`: each goes so many steps, 0: each its own number."""
    # Steps that are known in number leave no rest to write out once more, which would be compiled as well.
    unroll = next((k for k in (_UNROLL, _UNROLL + 1) if even % k == 0), 1) if even else _UNROLL

    def fit(count: Any, flats: Any, owns: Any, x: Any, y: Any, masks: Any, steps: Any) -> Any:
        def alone(who: Any) -> Any:
            own = _at(owns, who)

            def go(number: Any, carried: Any) -> Any:
                mask = None if masks is None else masks[who, number]
                carry, loss = pure.step(carried[0], own, x[who, number], y[who, number], mask, number)
                return carry, carried[1] + loss

            def several(number: Any, carried: Any) -> Any:
                for k in range(unroll):
                    carried = go(number * unroll + k, carried)
                return carried

            first = pure.begin(flats if shared else _at(flats, who), own), jnp.float32(0)
            whole = even // unroll if even else steps[who] // unroll
            carried = jax.lax.fori_loop(0, whole, several, first)
            carry, loss = carried if even else jax.lax.fori_loop(whole * unroll, steps[who], go, carried)
            return pure.end(carry), loss

        def put(who: Any, out: Any) -> Any:
            return jax.tree.map(lambda into, one: into.at[who].set(one), out, alone(who))

        forms = jax.eval_shape(alone, 0)
        return jax.lax.fori_loop(
            0, count, put, jax.tree.map(lambda form: jnp.zeros((len(steps), *form.shape), form.dtype), forms)
        )

    return fit


def vmap(pure: Pure, shared: bool, even: int) -> Callable[..., Any]:
    """Return what fits clients side by side, for `most` steps; `even`: each goes as many."""

    def fit(most: Any, flats: Any, owns: Any, x: Any, y: Any, masks: Any, steps: Any) -> Any:
        step = jax.vmap(pure.step, (0, 0, 0, 0, None if masks is None else 0, None))

        def go(number: Any, carried: Any) -> Any:
            mask = None if masks is None else masks[:, number]
            new = step(carried[0], owns, x[:, number], y[:, number], mask, number)
            if even:
                return new[0], carried[1] + new[1]
            real = number < steps

            def keep(one: Any, other: Any) -> Any:
                return jnp.where(real.reshape(-1, *[1] * (one.ndim - 1)), one, other)

            return jax.tree.map(keep, new[0], carried[0]), carried[1] + jnp.where(real, new[1], 0)

        carry = jax.vmap(pure.begin, (None if shared else 0, 0))(flats, owns)
        carry, loss = jax.lax.fori_loop(0, most, go, (carry, jnp.zeros(len(steps), jnp.float32)))
        return jax.vmap(pure.end)(carry), loss

    return fit


class Calls:
    """The loops of one strategy, compiled for each form of their arrays that comes.

    Args:
        pure: the learner's functions.
        how: the strategy.
    """

    def __init__(self, pure: Pure, how: How) -> None:
        self._pure, self._make = pure, scan if how == "scan" else vmap
        self._compiled: dict[Any, Any] = {}
        self._seen: set[Any] = set()
        self._lock = Lock()

    def __call__(self, kind: tuple[bool, int], *arrays: Any) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
        """Call the loop of a kind, `(shared, even)`; one thread compiles, the others wait for it."""
        x, y = arrays[3:5]
        key = (kind, x.shape, x.dtype, y.shape, y.dtype, arrays[5] is None)
        if key in self._seen:
            found, losses = self._compiled[kind](*arrays)
        else:
            with self._lock:
                if kind not in self._compiled:
                    self._compiled[kind] = jax.jit(self._make(self._pure, *kind))
                found, losses = self._compiled[kind](*arrays)
                self._seen.add(key)
        return {name: np.asarray(array) for name, array in found.items()}, np.asarray(losses)


def together(pure: Pure) -> Together:
    """Return what fits and judges many clients of a learner whose functions are pure."""
    return Together(pure.own, pure.arrays, lambda how: Calls(pure, how), jax.jit(pure.judge), pure.sums, pure.apart)
