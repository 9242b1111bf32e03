"""A real Kafka that asks who comes: TLS, SCRAM, and each may do no more than their part."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from tests.cli.test_commands import atoll as command
from tests.cli.test_commands import one_line
from tests.federation import plan, rows
from tests.server.test_retention import replayed

from atoll import tls
from atoll.cli import doctor, keep
from atoll.cli import kafka as cli
from atoll.errors import AtollError, LogError, RefusedError
from atoll.keys import Identity
from atoll.logs import Record, access, broker, guarded, topics
from atoll.logs.kafka import KafkaAppender, KafkaReader
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.store.sql import SqlStore
from atoll.testing.logs import LIMIT, RUN, body_of


class Guarded(NamedTuple):
    """A broker with users."""

    address: str
    directory: Path

    def user(self, name: str) -> Path:
        return guarded.file(self.directory, name)

    def known(self, name: str) -> access.Access:
        return access.read(self.user(name))

    def add(self, node: str, prefix: str) -> Path:
        return guarded.allow(self.directory, self.address, node, f"{prefix}updates")


@pytest.fixture(scope="module")
def kafka(tmp_path_factory) -> Iterator[Guarded]:
    """One for all tests here."""
    place = tmp_path_factory.mktemp("guarded")
    running = broker.start(place, report=print, secure=True)
    yield Guarded(running.address, place)
    broker.stop(place)


def agreed(kafka: Guarded, prefix: str, **sections: Any) -> Plan:
    cohort = {"minimum": 2, "quorum": 1.0, "deadline": 30}
    return plan(log={"kafka": kafka.address, "topics": "node", "prefix": prefix}, cohort=cohort, **sections)


def node_at(place: Path, name: str, kafka: Guarded, prefix: str) -> Path:
    """A node's directory with a key, whose file the broker's operator has made."""
    return kafka.add(Identity.at(place / name / "node.key").node, prefix)


def test_a_run_with_a_node_that_comes_later_and_a_server_that_dies(kafka, tmp_path, capsys, caplog):
    """Each writes to its own topic; the run goes on from them in another server, is replayed, and has the simulation's bits."""
    caplog.set_level(logging.DEBUG)
    prefix = "whole."
    given = agreed(kafka, prefix, plan={"rounds": 4})
    data = {f"node-{k}": rows(k) for k in range(3)}
    files = {name: node_at(tmp_path, name, kafka, prefix) for name in ("node-0", "node-1")}
    server_file = kafka.user("server")

    async def together() -> dict[str, Any]:
        second, later = asyncio.Event(), asyncio.Event()

        class Patient(Node):
            async def send_updates(self, command: Any) -> None:
                if command.task.round == 3:
                    await later.wait()
                await super().send_updates(command)

        def watch(event: Any) -> None:
            if event["what"] == "round" and event["round"] == 2:
                second.set()
            if event["what"] == "joined" and event["name"] == "node-2":
                later.set()

        def node(name: str) -> asyncio.Task[Any]:
            options: Any = {"name": name, "directory": tmp_path / name, "kafka_config": files[name]}
            return asyncio.create_task(Patient(first.url, data[name], **options).start_async())

        first = Server(given, store=tmp_path / "store", port=0, watch=watch, kafka_config=server_file)
        serving = asyncio.create_task(first.serve_async())
        nodes = [node("node-0"), node("node-1")]
        await second.wait()
        serving.cancel()  # no goodbye
        await asyncio.wait([serving])
        # Enrolled while the run goes on: its topic wasn't there when that began.
        files["node-2"] = await asyncio.to_thread(node_at, tmp_path, "node-2", kafka, prefix)
        port = int(first.url.rpartition(":")[2])
        resumed = Server(given, store=tmp_path / "store", port=port, watch=watch, resume=True, kafka_config=server_file)
        nodes.append(node("node-2"))
        history = await resumed.serve_async()
        await asyncio.gather(*nodes)
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert [row["round"] for row in history["rounds"]] == [1, 2, 3, 4]
    assert history["rounds"][-1]["answered"] == ["node-0", "node-1", "node-2"]
    both = simulate(given.with_(plan={"rounds": 2}), {name: data[name] for name in ("node-0", "node-1")})
    assert history["rounds"][1]["model"] == both.digest
    models = replayed(tmp_path / "store", history["run"], kafka.known("server"))
    assert models == [row["model"] for row in history["rounds"]]
    asyncio.run(keep._replay(None, tmp_path / "store", (), server_file, as_json=True))
    assert json.loads(capsys.readouterr().out)["rounds"] == 4
    base = SqlStore(tmp_path / "store")
    with base.pruning([history["run"]], 1.0):
        pass
    with pytest.raises(RefusedError, match="doesn't let this user drop messages: give --kafka-config its admin's file"):
        keep._drop(base, server_file)
    keep._drop(base, kafka.user("admin"))
    base.close()
    topic = f"{prefix}updates"
    for name in data:
        own = Identity.at(tmp_path / name / "node.key").node
        (start,) = topics._offsets(kafka.address, kafka.known("admin"), [topics.partition_of(topic, f"{own}/0")])
        assert start[0] == start[1] > 0, "nothing is left of it"
    # Nobody's password is in what a run leaves, nor in what the broker logs, nor on a command line.
    secrets = [kafka.known(user)["sasl.password"].encode() for user in ("admin", "server")]
    secrets += [access.read(path)["sasl.password"].encode() for path in files.values()]
    running = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, check=True).stdout
    left = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    left += [(kafka.directory / name).read_bytes() for name in ("broker.log", "server.properties", "broker.json")]
    assert not any(secret in text for secret in secrets for text in (*left, running, caplog.text.encode()))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (kafka.directory / "access").iterdir())


def denied(kafka: Guarded, user: str, topic: str) -> str:
    """What the broker says to a user who writes to a topic."""
    producer = Producer({**topics.settings(kafka.address, kafka.known(user), lambda _: None), "message.timeout.ms": 10000})
    said: list[str] = []
    producer.produce(topic, b"x", on_delivery=lambda error, _: said.append(error.name() if error else "written"))
    producer.flush(15)
    return said[0]


def test_nobody_does_more_than_their_part(kafka):
    one, two = Identity.new().node, Identity.new().node
    for node in (one, two):
        kafka.add(node, "part.")
    assert denied(kafka, one, f"part.updates.{one}") == "written"
    assert denied(kafka, one, f"part.updates.{two}") == "TOPIC_AUTHORIZATION_FAILED"
    assert denied(kafka, one, "part.updates.new") == "TOPIC_AUTHORIZATION_FAILED"
    assert denied(kafka, "server", f"part.updates.{two}") == "TOPIC_AUTHORIZATION_FAILED"
    with pytest.raises(RefusedError, match=r"has no topic part\.updates\.new, and this user may not make it"):
        topics.make(kafka.address, "part.updates.new", kafka.known(one))
    with pytest.raises(RefusedError, match=f"has no topic part.updates.{'0' * 32}, .*: `atoll kafka users add {'0' * 32}`"):
        topics.make(kafka.address, f"part.updates.{'0' * 32}", kafka.known("server"))
    with pytest.raises(RefusedError, match="doesn't let this user do that"):
        KafkaAppender(kafka.address, f"part.updates.{two}", kafka.known(one)).check()
    running = broker.status(kafka.directory)
    assert running
    assert tls.asks_for_a_certificate("127.0.0.1", running.controller), "its controller talks to nobody but itself"
    assert read_by(kafka, one, f"part.updates.{one}") == "TOPIC_AUTHORIZATION_FAILED"
    assert read_by(kafka, "server", f"part.updates.{one}") == "x"


def read_by(kafka: Guarded, user: str, topic: str) -> str:
    """What a user gets who reads a topic."""
    settings = topics.settings(kafka.address, kafka.known(user), lambda _: None)
    consumer = Consumer({**settings, "group.id": "atoll-test", "auto.offset.reset": "earliest"})
    consumer.assign([TopicPartition(topic, 0, 0)])
    try:
        while (message := consumer.poll(10)) is not None:
            if message.error() is None:
                return message.value().decode()
            if (name := message.error().name()) != "GROUP_AUTHORIZATION_FAILED":  # which comes first, and is another matter
                return name
        raise AssertionError
    finally:
        consumer.close()


def test_who_is_not_let_in_hears_so_in_one_line(kafka, tmp_path):
    """At once, instead of trying for ever; and nothing goes in the open."""
    node = Identity.new()
    kafka.add(node.node, "in.")
    topic, known = f"in.updates.{node.node}", kafka.known(node.node)
    wrong = {**known, "sasl.password": "wrong"}
    no_ca = {name: value for name, value in known.items() if name != "ssl.ca.pem"}
    for given, said in (
        (wrong, "refuses the user or password of --kafka-config .*: ask its operator for a new file"),
        (no_ca, "no TLS that both sides believe in .*: is ssl.ca.pem of --kafka-config its CA"),
        ({}, "speaks TLS and asks who comes: give --kafka-config the file made for this side"),
    ):
        with pytest.raises(RefusedError, match=said):
            KafkaAppender(kafka.address, topic, given).check()
        with pytest.raises(RefusedError, match=said):
            KafkaReader(kafka.address, "in.updates", RUN, tmp_path, LIMIT, access=given, apart=True)
    envelope, body = body_of(node, 1, b"never sent")
    with pytest.raises(RefusedError, match="refuses the user or password"):
        asyncio.run(KafkaAppender(kafka.address, topic, wrong).append(envelope, body))
    with pytest.raises(RefusedError, match="give --kafka-config the file made for this side"):
        Server(agreed(kafka, "in."), store=tmp_path / "store", port=0)
    assert doctor._broker(kafka.address, kafka.user("server")).said == f"{kafka.address} answers: 1 in all"
    assert "give --kafka-config" in doctor._broker(kafka.address, None).said


def test_nobody_spoils_anothers_body(kafka, tmp_path):
    """Its envelope in a topic of one's own, with other pieces, is nobody's; the node's own body counts."""
    victim, thief = Identity.new(), Identity.new()
    for node in (victim, thief):
        kafka.add(node.node, "spoil.")
    envelope, body = body_of(victim, 1, b"what was signed" * 9)

    async def scenario() -> tuple[Record, int]:
        reader = KafkaReader(kafka.address, "spoil.updates", RUN, tmp_path, LIMIT, access=kafka.known("server"), apart=True)
        for node in (victim, thief):
            await asyncio.to_thread(reader.follow, node.node)
        records = reader.records()
        spoilt = KafkaAppender(kafka.address, f"spoil.updates.{thief.node}", kafka.known(thief.node))
        await spoilt.append(envelope, [memoryview(b"what was spoilt" * 9)])
        own = KafkaAppender(kafka.address, f"spoil.updates.{victim.node}", kafka.known(victim.node))
        coming = asyncio.ensure_future(anext(records))
        while not reader.skipped:
            await asyncio.sleep(0)
        await own.append(envelope, body)
        record = await coming
        assert bytes(reader.body(envelope)) == b"".join(body)
        for one in (own, spoilt, reader):
            await one.close()
        return record, reader.skipped

    record, skipped = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert (record.envelope, record.refused, skipped) == (envelope, None, 1)


def test_who_is_revoked_writes_no_more(kafka):
    node = Identity.new()
    topic = f"gone.updates.{node.node}"
    known = access.read(kafka.add(node.node, "gone."))

    async def scenario() -> None:
        appender = KafkaAppender(kafka.address, topic, known)
        await appender.append(*body_of(node, 1, b"one"))
        await asyncio.to_thread(cli.revoke, node.node, kafka.directory)
        with pytest.raises(RefusedError, match="doesn't let this user do that"):
            await appender.append(*body_of(node, 2, b"two"))  # by a connection that is open still
        with pytest.raises(RefusedError, match="refuses the user or password"):
            await asyncio.to_thread(KafkaAppender(kafka.address, topic, known).check)

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert not kafka.user(node.node).exists()
    with pytest.raises(LogError, match="user credential that does not exist"):
        cli.revoke(node.node, kafka.directory)


def test_users_by_command_and_mistakes(kafka, tmp_path, capsys):
    def told(act: Any, *words: Any, **options: Any) -> Any:
        act(*words, **options, as_json=True)
        return json.loads(capsys.readouterr().out)

    node, place = Identity.new().node, kafka.directory
    assert told(cli.add, node, place, "by.") == {"node": node, "topic": f"by.updates.{node}", "file": str(kafka.user(node))}
    assert {"admin", "server", node} <= set(told(cli.list_, place)["users"])
    assert told(cli.start, place)["secure"] is True
    assert told(cli.revoke, node, place) == {"node": node}
    assert "'north' is no node's id" in one_line(command("kafka", "users", "add", "north", "--dir", place))
    with pytest.raises(AtollError, match="no broker runs there"):
        cli.list_(tmp_path)
    (tmp_path / "open" / "data").mkdir(parents=True)
    with pytest.raises(AtollError, match="holds a broker that asks nobody who comes; choose another --dir"):
        guarded.prepare(tmp_path / "open")
    with pytest.raises(LogError, match="no broker with users is there"):
        guarded.admin(tmp_path / "open")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plugin.library.paths=evil.so", "line 1: 'plugin.library.paths' is none of sasl.mechanism"),
        ("sasl.kerberos.kinit.cmd=evil", "is none of"),
        ("enable.ssl.certificate.verification=false", "is none of"),
        ("# a comment\n\ns3cret", "line 3: is no name=value"),
        ("sasl.username=x\nsasl.password=s3cret", "security.protocol is SASL_SSL or SSL"),
        ("security.protocol=SASL_PLAINTEXT", "security.protocol is SASL_SSL or SSL"),
        (b"\xff\xfe", "can't be read"),
    ],
)
def test_a_file_that_says_what_is_not_wanted(tmp_path, text, said):
    path = tmp_path / "file"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)
    with pytest.raises(AtollError, match=said) as error:
        access.read(path)
    assert "s3cret" not in str(error.value)


def test_a_file_that_others_may_read(tmp_path):
    path = tmp_path / "file"
    path.write_text(access.written({"security.protocol": "SASL_SSL", "sasl.password": "s3cret", "ssl.ca.pem": "a\nb\n"}))
    path.chmod(0o644)
    with pytest.raises(AtollError, match="other users of this machine may read its password; chmod 600"):
        access.read(path)
    path.chmod(0o600)
    assert access.read(path)["ssl.ca.pem"] == "a\nb\n"
    with pytest.raises(AtollError, match="`atoll kafka users add` writes such a file"):
        access.read(tmp_path / "none")


def test_the_file_is_named_by_an_option_or_a_variable(tmp_path):
    given, none = tmp_path / "plan.json", str(tmp_path / "none")
    given.write_text(plan().to_json())
    for words, named in (
        (["join", "http://127.0.0.1:1", "--data", given, "--dir", tmp_path / "node"], {"ATOLL_KAFKA_CONFIG": none}),
        (["serve", given, "--store", tmp_path / "store", "--kafka-config", none], {}),
    ):
        assert f"--kafka-config {none}: can't be read" in one_line(command(*words, **named))


def test_only_kafka_has_topics():
    with pytest.raises(AtollError, match='log: topics = "node" is of Kafka'):
        plan(log={"topics": "node"})
