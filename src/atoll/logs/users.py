"""Whom a guarded Kafka knows, and what each may do: a node writes to its own topic, the server reads, nobody does more."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)

from atoll.errors import LogError
from atoll.logs import topics
from atoll.logs.access import Access

_ITERATIONS = 8192
_ALL = "*"


def allow_server(servers: str, access: Access, user: str, password: str) -> None:
    """Let a server read every topic, and nothing else.

    Raises:
        RefusedError, LogError: it can't be done.
    """
    admin = _known(servers, access, user, password)
    may = ((ResourceType.TOPIC, AclOperation.READ), (ResourceType.GROUP, AclOperation.READ))
    _done(servers, admin.create_acls([_acl(kind, _ALL, user, what) for kind, what in may]).values())


def allow_node(servers: str, access: Access, node: str, password: str, topic: str) -> None:
    """Let a node write to its own topic, which is made, and nothing else.

    Raises:
        RefusedError, LogError: it can't be done.
    """
    topics.make(servers, f"{topic}.{node}", access)
    admin = _known(servers, access, node, password)
    _done(servers, admin.create_acls([_acl(ResourceType.TOPIC, f"{topic}.{node}", node, AclOperation.WRITE)]).values())


def known(servers: str, access: Access) -> list[str]:
    """Return whom the broker knows.

    Raises:
        RefusedError, LogError: it can't be asked.
    """
    topics.reach(servers, access)
    admin: Any = AdminClient(topics.settings(servers, access, topics.Ear(servers)))
    return sorted(_done(servers, [admin.describe_user_scram_credentials()])[0])


def refuse(servers: str, access: Access, node: str) -> None:
    """Let a node in no more, and what it still has open do nothing any more.

    Raises:
        RefusedError, LogError: it can't be done; a node that is not known is one that can't.
    """
    topics.reach(servers, access)
    admin = AdminClient(topics.settings(servers, access, topics.Ear(servers)))
    every_acl: Any = AclBindingFilter
    every = every_acl(
        ResourceType.ANY, None, ResourcePatternType.ANY, f"User:{node}", None, AclOperation.ANY, AclPermissionType.ANY
    )
    _done(servers, admin.delete_acls([every]).values())
    gone = UserScramCredentialDeletion(node, ScramMechanism.SCRAM_SHA_512)
    _done(servers, admin.alter_user_scram_credentials([gone]).values())


def _known(servers: str, access: Access, user: str, password: str) -> Any:
    """Have the broker know a user by a password: a new one, or one that gets another password."""
    topics.reach(servers, access)
    admin = AdminClient(topics.settings(servers, access, topics.Ear(servers)))
    how = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, _ITERATIONS)
    made = UserScramCredentialUpsertion(user, how, password.encode())
    _done(servers, admin.alter_user_scram_credentials([made]).values())
    return admin


def _acl(kind: Any, name: str, user: str, what: Any) -> Any:
    return AclBinding(kind, name, ResourcePatternType.LITERAL, f"User:{user}", _ALL, what, AclPermissionType.ALLOW)


def _done(servers: str, asked: Iterable[Future[Any]]) -> list[Any]:
    try:
        return [one.result(topics.PATIENCE) for one in asked]
    except TimeoutError as error:
        raise LogError(f"Kafka at {servers} doesn't answer; is it running? `atoll kafka start --secure`") from error
    except KafkaException as error:
        raise LogError(f"Kafka at {servers}: {error.args[0].str()}") from error
