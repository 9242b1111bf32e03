"""The JavaScript client, a node written from docs/protocol.md alone: it takes part beside Python nodes, and its updates count."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.federation import plan

from atoll import learners
from atoll.errors import UnreachableError
from atoll.logs.embedded import EmbeddedLog
from atoll.node.runtime import Node
from atoll.preprocess import prepare
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.store.enrolment import Enrolment
from atoll.store.models import Models
from atoll.store.sql import SqlStore
from atoll.wire import Envelope

EXAMPLE = Path(__file__).parents[2] / "examples" / "javascript-client"
COLUMNS = {
    "features": ["age", "kind", "sugar"],
    "categories": {"kind": ["a", "b", "c"]},
    "target": "state",
    "positive": ["ill"],
    "missing": ["?"],
    "split": "set",
    "standardise": "node",
}
AGREED = plan(
    plan={"rounds": 4},
    model={"inputs": None},
    data=COLUMNS,
    training={"learning_rate": 0.1},
    cohort={"minimum": 3, "deadline": 30},
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client with what `npm ci` installs, outside of the repository."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node 18 or newer and npm: apt install nodejs npm")
    place = tmp_path_factory.mktemp("javascript")
    for name in ("client.mjs", "package.json", "package-lock.json", ".npmrc"):
        shutil.copy(EXAMPLE / name, place / name)
    subprocess.run(["npm", "ci", "--silent"], cwd=place, check=True, timeout=100)
    return place / "client.mjs"


def table(path: Path, seed: int) -> Path:
    """Rows whose class follows age and kind; every ninth is for testing, and a few have a missing value."""
    rng = np.random.default_rng(seed)
    lines = ["set,age,kind,sugar,state"]
    for k in range(120):
        age, kind, sugar = rng.normal(50, 9), "abc"[rng.integers(3)], rng.normal()
        ill = (age - 50) / 9 + (kind == "c") + 0.3 * rng.normal() > 0.3
        side, known = "test" if k % 9 == 0 else "train", "?" if k % 40 == 7 else f"{sugar:.3f}"
        lines.append(f"{side},{age:.3f},{kind},{known},{'ill' if ill else 'well'}")
    path.write_text("\n".join(lines) + "\n")
    return path


@contextlib.asynccontextmanager
async def started(client: Path, *words: str | Path, token: str = "") -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        "node", client, *map(str, words), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "ATOLL_JOIN_TOKEN": token},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def federation(
    client: Path, place: Path, made: Callable[[Server], Any] = id, tokens: Mapping[str, str] | None = None, **options: Any
) -> tuple[dict[str, Any], str, int | None]:
    """Two Python nodes and a JavaScript one; returns the history, and what the latter said and returned."""

    async def together() -> tuple[dict[str, Any], str, int | None]:
        server = Server(AGREED, store=place / "store", port=0, **options)
        made(server)
        tables = {name: table(place / f"{name}.csv", seed) for name, seed in PYTHON.items()}
        shown = tokens or {}
        nodes = [
            Node(server.url, path, name=name, directory=place / name, token=shown.get(name)) for name, path in tables.items()
        ]
        words = [server.url, "--data", table(place / "script.csv", 3), "--name", "script", "--dir", place / "script"]
        async with started(client, *words, token=shown.get("script", "")) as process:
            history, said, *_ = await asyncio.gather(
                server.serve_async(), process.communicate(), *(node.start_async() for node in nodes)
            )
            return history, said[0].decode(), process.returncode

    place.mkdir(exist_ok=True)
    return asyncio.run(asyncio.wait_for(together(), 60))


PYTHON: Mapping[str, int] = {"east": 1, "north": 2}


def test_it_takes_part_and_its_updates_count(client, tmp_path):
    holdout = prepare(table(tmp_path / "holdout.csv", 9), AGREED).test
    history, said, code = federation(client, tmp_path, holdout=holdout)
    assert code == 0, said
    assert [row["answered"] for row in history["rounds"]] == [["east", "north", "script"]] * 4
    assert not any(row["refused"] for row in history["rounds"])

    data = {name: prepare(tmp_path / f"{name}.csv", AGREED) for name in (*PYTHON, "script")}
    store = SqlStore(tmp_path / "store")
    (script,) = (node["node"] for node in history["nodes"] if node["name"] == "script")
    weights = {(row.round, row.weight) for row in store.updates(history["run"]) if row.node == script}
    assert weights == {(number, float(len(data["script"].train))) for number in (1, 2, 3, 4)}

    # It trains otherwise than the Python node does (its own draw of batches), but on the same rows and as well.
    with_python = simulate(AGREED, data, holdout=holdout)
    without = simulate(AGREED.with_(cohort={"minimum": 2}), {name: data[name] for name in PYTHON}, holdout=holdout)
    assert history["last"] not in (with_python.digest, without.digest)
    start, end = history["initial_evaluation"]["holdout"], history["rounds"][-1]["holdout"]
    assert end["loss"] < 0.8 * start["loss"]
    assert end["loss"] == pytest.approx(with_python.holdout["loss"], abs=0.03)


def test_it_joins_by_a_token_that_it_never_sends(client, tmp_path):
    """Where the server has a list: the first time by the token, which then is its key's; with another one it is told so."""
    enrolment = Enrolment(tmp_path / "store")
    tokens = {name: enrolment.add(name) for name in (*PYTHON, "script")}
    history, said, code = federation(client, tmp_path, tokens=tokens)
    assert code == 0, said
    assert [row["answered"] for row in history["rounds"]] == [["east", "north", "script"]] * 4
    assert [(one.name, one.state) for one in enrolment.all()][-1] == ("script", "joined")
    enrolment.close()
    assert not any(tokens["script"].encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_it_judges_as_a_python_node_does(client, tmp_path):
    """The same model on the same rows: the same sums, to the last bits of a logarithm."""

    history, said, code = federation(client, tmp_path)
    assert code == 0, said
    learner = learners.build(AGREED)
    model = Models(tmp_path / "store" / "models").get(history["last"], learner.layouts)
    mine = prepare(tmp_path / "script.csv", AGREED)
    by_hand = learner.evaluate(model, mine.judge)
    rows = [row for row in SqlStore(tmp_path / "store").evaluations(history["run"]) if row.round == 4]
    (script,) = (node["node"] for node in history["nodes"] if node["name"] == "script")
    (judged,) = (row.metrics for row in rows if row.place == script)
    assert judged == pytest.approx(by_hand, rel=1e-9)
    kept = (tmp_path / "script" / "final.safetensors").read_bytes()
    assert hashlib.sha256(kept).hexdigest() == history["last"]
    assert not list((tmp_path / "script").glob("update-*"))
    assert (tmp_path / "script" / "node.pem").stat().st_mode & 0o777 == 0o600


def test_it_may_be_started_before_the_server(client, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def together() -> tuple[dict[str, Any], int | None]:
        mine = table(tmp_path / "script.csv", 3)
        words = [f"http://127.0.0.1:{port}", "--data", mine, "--dir", tmp_path / "script"]
        async with started(client, *words) as process:
            assert process.stdout
            assert b"trying again" in await process.stdout.readline()
            server = Server(AGREED.with_(cohort={"minimum": 1}), store=tmp_path / "store", port=port)
            history, _ = await asyncio.gather(server.serve_async(), process.communicate())
            return history, process.returncode

    history, code = asyncio.run(asyncio.wait_for(together(), 60))
    assert code == 0
    assert history["outcome"] == "completed"


def test_it_goes_on_where_an_upload_broke_off(client, tmp_path, monkeypatch):
    """Everybody's first upload breaks off after 100 bytes: each asks how much is there, and sends the rest of the same body."""
    receive, starts = EmbeddedLog.receive, collections.defaultdict(list)

    async def breaking(log: EmbeddedLog, envelope: Envelope, start: int, chunks: AsyncIterator[bytes]) -> bool:
        async def broken() -> AsyncIterator[bytes]:
            yield (await anext(chunks))[:100]
            raise UnreachableError("the line is cut")

        mine = starts[envelope.address.node]
        mine.append(start)
        return await receive(log, envelope, start, chunks if len(mine) > 1 else broken())

    monkeypatch.setattr(EmbeddedLog, "receive", breaking)
    history, said, code = federation(client, tmp_path)
    assert code == 0, said
    assert list(starts.values()) == [[0, 100, 0, 0, 0]] * 3
    assert history["rounds"][0]["answered"] == ["east", "north", "script"]


def test_connections_cut_in_every_round_lose_nothing(client, tmp_path):
    """The server hangs up on everybody as soon as they were asked: each comes back, is asked again, and sends one body."""
    servers: list[Server] = []

    def cut(event: Mapping[str, Any]) -> None:
        if event["what"] == "asked" and len(event["nodes"]) == 3:
            channel = servers[0].channel
            for node in list(channel._nodes):
                asyncio.get_running_loop().create_task(channel.hang_up(node))

    history, said, code = federation(client, tmp_path, watch=cut, made=servers.append)
    assert code == 0, said
    assert [row["answered"] for row in history["rounds"]] == [["east", "north", "script"]] * 4
    assert not any(row["refused"] for row in history["rounds"])


@pytest.mark.parametrize(
    ("changed", "words", "said"),
    [
        ({"aggregation": {"rule": "newton"}}, [], "only take part in plans with logistic = true, data.features, sgd and fedavg"),
        ({"training": {"schedule": {"kind": "cosine"}}}, [], "doesn't know what the plan asks: training.schedule"),
        ({"compression": {"up": ["8bit"]}}, [], "doesn't know what the plan asks: compression.up"),
        ({"data": {"features": ["age", "size"], "categories": {}}}, [], "has no column 'size'; there are: set, age, kind"),
        ({}, ["--plan", "0" * 64], "not 0000"),
        ({}, ["--token", "f" * 48, "--name", "script"], "the token is not the one that was made for 'script'"),
        ({}, ["--name", "a b"], "error: no 'connect' message: name"),
        ({}, ["--port", "1"], "error: Unknown option '--port'"),
    ],
)
def test_what_it_cannot_do_is_one_line(client, tmp_path, changed, words, said):
    if "--token" in words:
        with contextlib.closing(Enrolment(tmp_path / "store")) as enrolment:
            enrolment.add("script")

    async def refused() -> tuple[str, int | None]:
        server = Server(AGREED.with_(**changed), store=tmp_path / "store", port=0)
        serving = asyncio.create_task(server.serve_async())
        mine = table(tmp_path / "script.csv", 3)
        async with started(client, server.url, "--data", mine, "--dir", tmp_path / "script", *words) as process:
            out, _ = await process.communicate()
        server.stop()
        await serving
        return out.decode(), process.returncode

    out, code = asyncio.run(asyncio.wait_for(refused(), 30))
    assert code == 2
    (line,) = (line for line in out.splitlines() if not line.startswith("plan "))
    assert line.startswith("error: ")
    assert said in line
