"""What a broker holds: topics, where they begin and end, and whom it lets in.

A topic is `<prefix>updates`, which all nodes share, or one a node: `<prefix>updates.<node>`. A place in it is written as
`partition:offset`, in a node's own topic as `node/partition:offset`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec  # type: ignore[attr-defined]

from atoll.errors import LogError, RefusedError, UnreachableError
from atoll.logs.access import PLAIN, Access
from atoll.tls import speaks_tls

PATIENCE = 10.0
"""Seconds in which nothing moves until a broker counts as down."""
_FOR_GOOD = (KafkaError._AUTHENTICATION, KafkaError._SSL)  # noqa: SLF001  their names
_FORBIDDEN = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED)


class Ear:
    """Hears from a client why nothing moves; what can't mend itself is kept in `refusal`."""

    def __init__(self, servers: str) -> None:
        self._servers = servers
        self.refusal: str | None = None

    def __call__(self, error: KafkaError) -> None:
        """Hear of an error."""
        if error.code() in _FOR_GOOD:
            self.refusal = refusal(self._servers, error)


def refusal(servers: str, error: KafkaError) -> str | None:
    """Say what an error means that trying again can't mend, or None."""
    said = re.sub(r"^\S+/\S+: | \(after .*", "", error.str())
    if error.code() == KafkaError._AUTHENTICATION:  # noqa: SLF001
        return f"Kafka at {servers} refuses the user or password of --kafka-config ({said}): ask its operator for a new file"
    if error.code() == KafkaError._SSL:  # noqa: SLF001
        return f"Kafka at {servers}: no TLS that both sides believe in ({said}): is ssl.ca.pem of --kafka-config its CA?"
    if error.code() in _FORBIDDEN:
        return f"Kafka at {servers} doesn't let this user do that ({said}): `atoll kafka users add NODE`, or --kafka-config"
    return None


def settings(servers: str, access: Access, hear: Any) -> dict[str, Any]:
    """Return what every client of a broker is made with."""
    return {"bootstrap.servers": servers, "error_cb": hear, "log_level": 0, **access}


def reach(servers: str, access: Access = PLAIN, patience: float = PATIENCE, topic: str | None = None) -> Any:
    """Return a broker's own account of itself and, where one is named, of a topic.

    Raises:
        RefusedError: it won't have this user, or is not believed.
        LogError: it doesn't answer within so many seconds.
    """
    hear, until = Ear(servers), time.monotonic() + patience
    admin, said = AdminClient(settings(servers, access, hear)), "nothing came"
    while hear.refusal is None and time.monotonic() < until:
        try:
            found = admin.list_topics(topic, min(1.0, patience))
        except KafkaException as error:
            said = error.args[0].str()
            admin.poll(0.05)
            if not access and any(_hides(one) for one in servers.split(",")):
                raise RefusedError(
                    f"Kafka at {servers} speaks TLS and asks who comes: give --kafka-config the file made for this side"
                ) from error
            continue
        wrong = found.topics[topic].error if topic else None
        if wrong and (no := refusal(servers, wrong)):
            raise RefusedError(no)
        return found
    if hear.refusal:
        raise RefusedError(hear.refusal)
    raise LogError(f"Kafka at {servers} doesn't answer ({said}); is it running? `atoll kafka start`")


def _hides(server: str) -> bool:
    place = urlsplit(f"//{server.strip()}")
    return speaks_tls(place.hostname or "", place.port or 9092)


def brokers(servers: str, patience: float, access: Access = PLAIN) -> int:
    """Return how many brokers there are, as one of these tells.

    Raises:
        RefusedError, LogError: see `reach`.
    """
    return len(reach(servers, access, patience).brokers)


def make(servers: str, topic: str, access: Access = PLAIN) -> None:
    """Make a topic, where it isn't there and this user may.

    Raises:
        RefusedError, LogError: see `reach`; or it isn't there, and this user may not make it.
    """
    there = reach(servers, access).topics
    if topic in there and there[topic].error is None:
        return
    # Synced before acknowledged; and the log is the truth, so it goes when an operator says so, not after Kafka's seven days.
    config = {"flush.messages": "1", "retention.ms": "-1"}
    admin = AdminClient(settings(servers, access, Ear(servers)))
    made = admin.create_topics([NewTopic(topic, 1, config=config)], request_timeout=PATIENCE)
    try:
        made[topic].result(PATIENCE)
    except TimeoutError as error:
        raise LogError(f"Kafka at {servers} doesn't answer; is it running? `atoll kafka start`") from error
    except KafkaException as error:
        code = error.args[0].code()
        if code in _FORBIDDEN:
            node = topic.rpartition(".")[2]
            mend = f"`atoll kafka users add {node}` makes it" if re.fullmatch("[0-9a-f]{32}", node) else "its operator may"
            raise RefusedError(f"Kafka at {servers} has no topic {topic}, and this user may not make it: {mend}") from error
        if code != KafkaError.TOPIC_ALREADY_EXISTS:
            raise LogError(f"Kafka at {servers}: topic {topic} can't be made ({error.args[0].str()})") from error


def place(text: str) -> tuple[str, int]:
    """Read a place: which partition, and the offset in it."""
    key, _, offset = text.rpartition(":")
    return key, int(offset)


def places(found: Mapping[str, int]) -> str:
    """Return places as text.

    >>> places({"0": 5, "ab/0": 7})
    '0:5 ab/0:7'
    """
    return " ".join(f"{key}:{offset}" for key, offset in found.items())


def partition_of(topic: str, key: str) -> TopicPartition:
    """Return which partition a place's key means."""
    node, _, number = key.rpartition("/")
    return TopicPartition(f"{topic}.{node}" if node else topic, int(number))


def ends(servers: str, topic: str, access: Access) -> dict[str, int]:
    """Return where every node's own topic that is there ends now.

    Raises:
        RefusedError, LogError: see `reach`.
    """
    own = re.compile(re.escape(topic) + r"\.([0-9a-f]{32})")
    found = reach(servers, access).topics.items()
    keys = [f"{named[1]}/{number}" for name, about in found if (named := own.fullmatch(name)) for number in about.partitions]
    told = _offsets(servers, access, [partition_of(topic, key) for key in keys])
    return {key: end for key, (_, end) in zip(keys, told)}


def begin(servers: str, topic: str, known: Mapping[str, int] | None, access: Access, node: str = "") -> list[TopicPartition]:
    """Return where to read each partition of a topic from: as it is known, or else from its end (None) or its beginning.

    Raises:
        RefusedError: see `reach`.
        UnreachableError: the broker doesn't answer.
        LogError: what is known to have been there is gone.
    """
    label, name = (f"{node}/", f"{topic}.{node}") if node else ("", topic)
    until = time.monotonic() + PATIENCE
    while not (partitions := reach(servers, access, topic=name).topics[name].partitions):
        if time.monotonic() > until:
            raise UnreachableError(f"Kafka at {servers}: topic {name} can't be read; is the broker running?")
        time.sleep(0.05)  # made just now: it takes the broker a moment to know of it
    found = [TopicPartition(name, number) for number in sorted(partitions)]
    for one, (first, end) in zip(found, _offsets(servers, access, found)):
        later = 0 if node else first  # a node's topic that isn't known came after the run began: all of it may be the run's
        one.offset = end if known is None else known.get(f"{label}{one.partition}", later)
        if not first <= one.offset <= end:
            raise LogError(
                f"Kafka at {servers}: topic {name} goes from {first} to {end}, but the run began at {one.offset}: "
                "its updates are gone; begin a new run, and keep them longer (retention.ms)"
            )
    return found


def _offsets(servers: str, access: Access, partitions: Sequence[TopicPartition]) -> list[tuple[int, int]]:
    """The first offset that is there, and the next one to come, of each partition."""
    if not partitions:
        return []
    admin, spec = AdminClient(settings(servers, access, Ear(servers))), cast("Any", OffsetSpec)
    try:
        told = [
            admin.list_offsets(dict.fromkeys(partitions, which), request_timeout=PATIENCE)
            for which in (spec.earliest(), spec.latest())
        ]
        return [(told[0][one].result(PATIENCE).offset, told[1][one].result(PATIENCE).offset) for one in partitions]
    except (KafkaException, TimeoutError) as error:
        raise UnreachableError(f"Kafka at {servers}: its topics can't be read ({error}); is the broker running?") from error


def let_go(servers: str, topic: str, before: Mapping[str, int], access: Access = PLAIN) -> None:
    """Have Kafka drop every message that lies before these places (-1: the end), of whichever run or server.

    Raises:
        RefusedError, LogError: it can't be done.
    """
    reach(servers, access)
    asked = [partition_of(topic, key) for key in before]
    for one, offset in zip(asked, before.values()):
        one.offset = offset
    try:
        admin = AdminClient(settings(servers, access, Ear(servers)))
        for done in admin.delete_records(asked, request_timeout=PATIENCE).values():
            done.result(PATIENCE)
    except (KafkaException, TimeoutError) as error:
        why = error.args[0] if isinstance(error, KafkaException) else None
        if why and why.code() in _FORBIDDEN:
            raise RefusedError(
                f"Kafka at {servers} doesn't let this user drop messages: give --kafka-config its admin's file"
            ) from error
        said = why.str() if why else "it doesn't answer"
        raise LogError(f"Kafka at {servers}: messages of topic {topic} can't be dropped ({said})") from error
