"""The floor of workload S: JAX by hand, clients spread over two host devices; of Atoll only what draws and measures.

python -m atoll.cli.bench.floor_simulate FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atoll.cli.bench import workload
from atoll.cli.bench.processes import peak

_UNROLL = 4


def _outputs(layers: Any, x: Any) -> Any:
    for at, (kernel, bias) in enumerate(layers):
        x = (jax.nn.relu(x) if at else x) @ kernel + bias
    return x


def _loss(layers: Any, x: Any, y: Any) -> Any:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(_outputs(layers, x)), y[:, None], 1))


def _fit(layers: Any, xs: Any, ys: Any) -> Any:
    def step(layers: Any, batch: Any) -> Any:
        gradient = jax.grad(_loss)(layers, *batch)
        return jax.tree.map(lambda weight, slope: weight - workload.RATE * slope, layers, gradient), None

    return jax.lax.scan(step, layers, (xs, ys), unroll=_UNROLL)[0]


def _part(layers: Any, xs: Any, ys: Any) -> Any:
    """One device's clients, one after the other, and the mean over all devices."""

    def one(total: Any, client: Any) -> Any:
        return jax.tree.map(jnp.add, total, _fit(layers, *client)), None

    total, _ = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, layers), (xs, ys))
    return jax.tree.map(lambda summed: jax.lax.psum(summed, "devices") / workload.COHORT, total)  # type: ignore[no-untyped-call]


def main(folder: Path) -> None:
    """Run the rounds; print their times and accuracies as one JSON object."""
    rows, schedule = workload.read(folder), workload.schedule()
    y = rows.y.astype(np.int32)
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    spread, same = PartitionSpec("devices"), PartitionSpec()  # type: ignore[no-untyped-call]
    mapped = jax.shard_map(_part, mesh=mesh, in_specs=(same, spread, spread), out_specs=same, check_vma=False)
    round_ = jax.jit(mapped)
    layers = jax.device_put(workload.first(), NamedSharding(mesh, same))
    accurate = jax.jit(lambda layers, x, y: (_outputs(layers, x).argmax(1) == y).mean())
    test = jnp.asarray(rows.x_test), jnp.asarray(rows.y_test)
    accurate(layers, *test).block_until_ready()
    ticks, accuracy = [time.perf_counter()], {}
    shape = (workload.COHORT, workload.ROWS // workload.BATCH, workload.BATCH)
    for number, clients in enumerate(schedule):
        order = np.stack([workload.order(number, client) for client in clients])
        xs = rows.x[clients[:, None], order].reshape(*shape, -1)
        layers = jax.block_until_ready(round_(layers, xs, y[clients[:, None], order].reshape(shape)))  # type: ignore[no-untyped-call]
        if (number + 1) % workload.JUDGED == 0:
            accuracy[number + 1] = round(float(accurate(layers, *test)), 4)
        ticks.append(time.perf_counter())
    sys.stdout.write(json.dumps({"seconds": np.diff(ticks).tolist(), "accuracy": accuracy, "peak_rss_mb": peak()}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
