"""Nodes that are lost and come back, late ones, and messages of other runs: the run goes on and no bit changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.federation import clients, plan, rows, run

from atoll.messages import StartTraining
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.server.runtime import Server
from atoll.simulate import simulate


class Counting(Node):
    """A node that counts how often it trains."""

    trained = 0

    def _work(self, task: StartTraining, body: bytes) -> str:
        self.trained += 1
        return super()._work(task, body)


def test_connections_cut_in_every_round_change_no_bit(tmp_path: Path):
    """Every node loses its connection just after it has sent its update: it comes back, and nothing is trained twice."""

    async def together() -> tuple[dict[str, Any], list[Counting]]:
        server = Server(plan(cohort={"quorum": 1.0}), store=tmp_path / "store", port=0)

        def cut(event: Any) -> None:
            if event["what"] == "sent":
                for node in list(server.channel._nodes)[:2]:
                    asyncio.get_running_loop().create_task(server.channel.hang_up(node))

        nodes = [Counting(server.url, data, name=name, directory=tmp_path / name, watch=cut) for name, data in clients().items()]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history, nodes

    history, nodes = asyncio.run(asyncio.wait_for(together(), 60))
    assert history["last"] == simulate(plan(), clients()).digest
    assert [node.trained for node in nodes] == [3, 3, 3]


def test_a_node_started_again_in_mid_round_resends_what_it_kept(tmp_path: Path):
    """A node dies when its update is on disk but not sent; started again it sends the very bytes, and trains no more for them."""
    agreed = plan(plan={"rounds": 1})

    class Dying(Counting):
        async def send_updates(self, command: Any) -> None:
            raise ConnectionAbortedError("the machine is switched off")

    async def together() -> tuple[dict[str, Any], Counting, bytes, bytes]:
        server = Server(agreed, store=tmp_path / "store", port=0)
        serving = asyncio.create_task(server.serve_async())
        data = clients()
        others = [
            asyncio.create_task(Node(server.url, data[name], name=name, directory=tmp_path / name).start_async())
            for name in ("node-0", "node-1")
        ]
        dying = Dying(server.url, data["node-2"], name="node-2", directory=tmp_path / "node-2")
        (died,) = await asyncio.gather(dying.start_async(), return_exceptions=True)
        assert isinstance(died, ConnectionAbortedError)
        (kept,) = (tmp_path / "node-2" / "outbox").glob("*.safetensors")
        body = kept.read_bytes()
        again = Counting(server.url, data["node-2"], name="node-2", directory=tmp_path / "node-2")
        await asyncio.gather(again.start_async(), *others)
        history = await serving
        (came,) = (tmp_path / "store" / "log" / server.run).glob(f"1-1-{again.identity.node}-*")
        return history, again, body, came.read_bytes()

    history, again, kept, came = asyncio.run(asyncio.wait_for(together(), 60))
    assert again.trained == 0
    assert came == kept
    assert history["last"] == simulate(agreed, clients()).digest


def test_a_lost_node_does_not_hang_the_run_and_is_welcome_again(tmp_path: Path):
    agreed = plan(cohort={"minimum": 2, "quorum": 0.5, "grace": 0.2})

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0)

        class Leaving(Node):
            async def start_training(self, task: StartTraining) -> None:
                raise ConnectionAbortedError("gone for good")

        nodes = [Node(server.url, data, name=name, directory=tmp_path / name) for name, data in clients().items()]
        gone = Leaving(server.url, rows(8), name="gone", directory=tmp_path / "gone")
        leaving = asyncio.create_task(gone.start_async())
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert history["outcome"] == "completed"
    assert all("gone" not in row["answered"] and len(row["answered"]) >= 2 for row in history["rounds"])


def test_a_late_node_joins_at_the_next_round(tmp_path: Path):
    agreed = plan(plan={"rounds": 3}, cohort={"minimum": 2})

    async def together() -> dict[str, Any]:
        late: list[asyncio.Task[Any]] = []
        data = clients()

        def watch(event: Any) -> None:
            if event["what"] == "asked" and not late:
                node = Node(server.url, data["node-2"], name="node-2", directory=tmp_path / "node-2")
                late.append(asyncio.get_running_loop().create_task(node.start_async()))

        server = Server(agreed, store=tmp_path / "store", port=0, watch=watch)
        nodes = [Node(server.url, data[name], name=name, directory=tmp_path / name) for name in ("node-0", "node-1")]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        await asyncio.gather(*late, return_exceptions=True)
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert history["rounds"][0]["answered"] == ["node-0", "node-1"]
    assert [row["round"] for row in history["rounds"]] == [1, 2, 3]


def test_stale_messages_on_the_topic_never_count(tmp_path: Path, kafka: str):
    """Two runs over one topic, one after the other, then garbage: each run's model is the one it makes alone."""
    from confluent_kafka import Producer

    agreed: Plan = plan(log={"kafka": kafka, "prefix": "stale."})
    expected = simulate(plan(), clients()).digest
    assert run(agreed, clients(), tmp_path / "first")["last"] == expected
    producer = Producer({"bootstrap.servers": kafka})
    for value, headers in ((b"junk", None), (b"", [("run", b"x")]), (b"more", [("envelope", b"{}"), ("part", b"-9")])):
        producer.produce("stale.updates", value, headers=headers)
    producer.flush(10)
    assert run(agreed, clients(), tmp_path / "second")["last"] == expected
