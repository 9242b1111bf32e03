"""What makes the local broker a guarded one: its certificates, its settings, and the files by which its users come in.

In the broker's directory: `tls/` with a CA of its own, and `access/` with a file for each user (mode 0600), as `--kafka-config`
takes it. Clients speak SASL_SSL with SCRAM; the broker speaks to itself by certificates of its CA; nobody comes in otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from atoll import tls
from atoll.errors import AtollError, LogError
from atoll.keys import new_token, write_private
from atoll.logs.access import Access, read, written

ADMIN, SERVER = "admin", "server"
_BROKER = "Atoll broker"
_MECHANISM = "SCRAM-SHA-512"
SETTINGS = """listeners=CLIENTS://127.0.0.1:{port},BROKER://127.0.0.1:0,CONTROLLER://127.0.0.1:{controller}
advertised.listeners=CLIENTS://127.0.0.1:{port},BROKER://127.0.0.1:0
listener.security.protocol.map=CLIENTS:SASL_SSL,BROKER:SSL,CONTROLLER:SSL
inter.broker.listener.name=BROKER
ssl.keystore.type=PEM
ssl.keystore.location={tls}/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location={tls}/ca.pem
listener.name.broker.ssl.client.auth=required
listener.name.controller.ssl.client.auth=required
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.clients.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=false
super.users=User:CN=Atoll broker;User:admin
"""
"""How it listens, and whom it believes: the rest is as for any local broker."""


def file(directory: Path, user: str) -> Path:
    """Return where a user's file is."""
    return directory / "access" / f"{user}.properties"


def is_guarded(directory: Path) -> bool:
    """Say whether the broker of a directory asks who comes."""
    return file(directory, ADMIN).exists()


def prepare(directory: Path) -> None:
    """Make what a guarded broker needs before it starts.

    Raises:
        AtollError: it can't be kept there, or a broker that asks nobody lives there.
    """
    if find_spec("confluent_kafka") is None:
        raise LogError("a broker that knows its users needs confluent-kafka: pip install 'atoll-fl[kafka]'")
    if not is_guarded(directory) and (directory / "data").exists():
        raise AtollError(f"{directory}: holds a broker that asks nobody who comes; choose another --dir for a --secure one")
    tls.pair(directory / "tls", _BROKER, directory / "tls" / "broker.pem", "localhost")
    if not is_guarded(directory):
        new_file(directory, ADMIN)


def new_file(directory: Path, user: str) -> Access:
    """Write a user's file with a new password, in place of an old one, and return what is in it."""
    path = file(directory, user)
    ca = (directory / "tls" / "ca.pem").read_text()
    said = {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": _MECHANISM,
        "sasl.username": user,
        "sasl.password": new_token(),
        "ssl.ca.pem": ca,
    }
    path.unlink(missing_ok=True)
    write_private(path, f"# by which Kafka knows {user}: for --kafka-config; keep it to yourself\n{written(said)}".encode())
    return said


def admin(directory: Path) -> Access:
    """Return by what the operator is known.

    Raises:
        LogError: the broker of this directory asks nobody.
    """
    if not is_guarded(directory):
        raise LogError(f"{directory}: no broker with users is there; `atoll kafka start --secure --dir {directory}` makes one")
    return read(file(directory, ADMIN))


def answers(directory: Path, address: str) -> bool:
    """Say whether the broker is ready for its operator."""
    from atoll.logs.topics import brokers  # needs an optional part

    with contextlib.suppress(LogError):
        return brokers(address, 1, admin(directory)) > 0
    return False


def allow(directory: Path, address: str, user: str, topic: str = "") -> Path:
    """Let a node write to its own topic (`topic.<node>`), or the server read all of them; return the user's new file.

    Raises:
        RefusedError, LogError: it can't be done.
    """
    from atoll.logs import users  # needs an optional part

    known_by, said = admin(directory), new_file(directory, user)
    try:
        if user == SERVER:
            users.allow_server(address, known_by, user, said["sasl.password"])
        else:
            users.allow_node(address, known_by, user, said["sasl.password"], topic)
    except AtollError:
        file(directory, user).unlink()
        raise
    return file(directory, user)


def refuse(directory: Path, address: str, node: str) -> None:
    """Let a node in no more.

    Raises:
        RefusedError, LogError: it can't be done; a node that is not known is one that can't.
    """
    from atoll.logs import users  # needs an optional part

    users.refuse(address, admin(directory), node)
    file(directory, node).unlink(missing_ok=True)


@contextlib.contextmanager
def first_user(directory: Path) -> Iterator[str]:
    """Give the argument by which the storage tool makes the operator's user: it names a file, so no password shows in `ps`."""
    path = directory / "format.args"
    path.unlink(missing_ok=True)
    write_private(path, f"--add-scram\n{_MECHANISM}=[name={ADMIN},password={admin(directory)['sasl.password']}]\n".encode())
    try:
        yield f"@{path}"
    finally:
        path.unlink()
