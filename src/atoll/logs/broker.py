"""A real single-node Apache Kafka (KRaft) on loopback, without Docker: for development and tests.

Enters: a directory. Leaves: a running broker's address; its data, settings and log lie in the directory. The jars come
from Maven Central once, into a cache of the user's that all brokers share.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from atoll.errors import LogError
from atoll.logs import guarded

VERSION = "4.1.0"
_JAVA = 17
_PATIENCE = 60.0
"""Seconds until a broker has to answer."""
Report = Callable[[str], None]

_POM = f"""<project><modelVersion>4.0.0</modelVersion>
<groupId>local</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
<dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>{VERSION}</version></dependency>
<dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>2.24.3</version></dependency>
</dependencies></project>
"""
_OPEN = """listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
inter.broker.listener.name=PLAINTEXT
"""
_SETTINGS = """process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
log.dirs={data}
num.partitions=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
log.flush.interval.messages=1
auto.create.topics.enable=false
"""
_PORT_PATIENCE = 5.0
"""Seconds until a port that is taken counts as somebody else's."""
_QUIET = range(15_000, 32_000)
"""Ports below those that systems give to outgoing connections."""
_LOGGING = """Configuration:
  status: WARN
  Appenders:
    Console:
      name: STDOUT
      PatternLayout:
        pattern: "%d %p %c{1}: %m%n"
  Loggers:
    Root:
      level: INFO
      AppenderRef:
        - ref: STDOUT
"""


@dataclass(frozen=True)
class Broker:
    """A running broker.

    Args:
        address: where clients reach it, `127.0.0.1:port`.
        controller: the port of its own controller.
        pid: its process.
        directory: where its data lie.
        secure: whether it asks who comes.
    """

    address: str
    controller: int
    pid: int
    directory: Path
    secure: bool = False


def start(directory: Path, port: int | None = None, *, report: Report, secure: bool = False) -> Broker:
    """Start a broker, or find it running; return once it answers.

    Args:
        directory: its own; a broker that ran there before keeps its data and port.
        port: on 127.0.0.1; without one the port of the last time, or the first time a free one.
        report: told what goes on.
        secure: ask everybody who they are, see `guarded`; a broker that once did does so for ever.

    Raises:
        LogError: Java or Maven are missing, the port is taken, or the broker doesn't come up.
    """
    directory = directory.absolute()
    if running := status(directory):
        return running
    java = _java()
    jars = _jars(report)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LogError(f"{directory}: the broker can't live there ({error.strerror}); choose another --dir") from error
    if secure := secure or guarded.is_guarded(directory):
        guarded.prepare(directory)
    ports = _ports(directory, port)
    settings = _configure(directory, *ports, guarded.SETTINGS if secure else _OPEN)
    run = [java, "-Xmx512m", "-Xms128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"]
    run += [f"-Dlog4j2.configurationFile={directory / 'log4j2.yaml'}", "-cp", f"{jars}/*"]
    if not (directory / "data" / "meta.properties").exists():
        report("formatting the broker's storage")
        with guarded.first_user(directory) if secure else contextlib.nullcontext() as user:
            more = [user] if user else []
            _format([*run, "kafka.tools.StorageTool", "format", "-t", _cluster(), "-c", str(settings), *more])
    report("starting Kafka")
    pid = _detached([*run, "kafka.Kafka", str(settings)], directory / "broker.log")
    broker = Broker(f"127.0.0.1:{ports[0]}", ports[1], pid, directory, secure)
    try:
        _await(broker)
        if secure and not guarded.file(directory, guarded.SERVER).exists():
            guarded.allow(directory, broker.address, guarded.SERVER)
    except BaseException:  # Ctrl-C too: nothing is left running
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise
    _note(directory).write_text(json.dumps({**asdict(broker), "directory": str(directory)}))
    return broker


def status(directory: Path) -> Broker | None:
    """Return the broker that runs in a directory, or None."""
    directory = directory.absolute()
    last = _last(directory)
    if last and _alive(last.pid, directory):
        return last
    return None


def stop(directory: Path) -> bool:
    """Stop the broker of a directory, whose data stays; return whether one ran."""
    running = status(directory)
    if running is None:
        return False
    for ask, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, ask)
        if _gone(running, patience):
            break
    return True


def _gone(broker: Broker, patience: float) -> bool:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if not _alive(broker.pid, broker.directory):
            return True
        time.sleep(0.05)
    return False


def _note(directory: Path) -> Path:
    return directory / "broker.json"


def _last(directory: Path) -> Broker | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Broker(**{**json.loads(_note(directory).read_text()), "directory": directory})
    return None


def _alive(pid: int, directory: Path) -> bool:
    """Say whether a process is the broker of a directory, and not another that took its number."""
    try:
        words = subprocess.run(
            ["ps", "-ww", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return False
    return str(directory) in words and not words.lstrip().startswith("Z")


def _java() -> str:
    java = shutil.which("java")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr if java else ""
    found = re.search(r'version "(\d+)', said)
    if java is None or found is None or int(found[1]) < _JAVA:
        have = f"found Java {found[1]}" if found else "found none"
        raise LogError(f"Kafka needs Java {_JAVA} or newer ({have}): apt install openjdk-17-jre-headless")
    return java


def _jars(report: Report) -> Path:
    """Return the directory of Kafka's jars; fetch them the first time, whole or not at all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atoll"
    jars = Path(os.environ.get("ATOLL_KAFKA_JARS") or cache / f"kafka-{VERSION}")
    if jars.is_dir():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise LogError("Kafka's jars come with Maven, which isn't installed: apt install maven")
    report(f"fetching Kafka {VERSION} (54 MB) with Maven")
    jars.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=jars.parent) as place:
        draft, pom = Path(place) / "jars", Path(place) / "pom.xml"
        pom.write_text(_POM)
        words = [maven, "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={draft}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.startswith("[ERROR]")] or ["it said nothing"]
            raise LogError(f"Maven can't fetch Kafka's jars: {lines[0].removeprefix('[ERROR] ')[:300]}")
        with contextlib.suppress(OSError):  # another process was quicker: its jars are as good
            draft.rename(jars)
    return jars


def _ports(directory: Path, port: int | None) -> tuple[int, int]:
    """Return the ports of clients and of the controller: those of the last time, since plans name the first of them."""
    last = _last(directory)
    known = port or (int(last.address.rpartition(":")[2]) if last else None)
    return _own(known) if known else free_port(), last.controller if last and _is_free(last.controller) else free_port()


def _own(port: int) -> int:
    """Return a port that has to be this one; what has it may be a connection that just ends.

    Raises:
        LogError: it stays taken.
    """
    until = time.monotonic() + _PORT_PATIENCE
    while not _is_free(port):
        if time.monotonic() > until:
            raise LogError(f"127.0.0.1 port {port} is taken: end what has it, or choose another --port and name it in the plan")
        time.sleep(0.1)
    return port


def free_port() -> int:
    """Return a port that no outgoing connection will have when the broker comes back to it."""
    return next(port for port in random.sample(_QUIET, len(_QUIET)) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _configure(directory: Path, port: int, controller: int, door: str) -> Path:
    settings = directory / "server.properties"
    values = {"port": port, "controller": controller, "data": directory / "data", "tls": directory / "tls"}
    settings.write_text((_SETTINGS + door).format(**values))
    (directory / "log4j2.yaml").write_text(_LOGGING)
    return settings


def _cluster() -> str:
    """Return a random id, as Kafka makes them: none begins with a dash, which would read as an option."""
    made = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    return _cluster() if made.startswith("-") else made


def _format(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise LogError(f"the broker's storage can't be formatted: {said[-1][:300]}")


def _detached(words: list[str], log: Path) -> int:
    """Run a program that outlives this one, in a session of its own; return its process id."""
    script = '"$@" >"$0" 2>&1 </dev/null & echo $!'
    done = subprocess.run(["sh", "-c", script, str(log), *words], stdout=subprocess.PIPE, start_new_session=True, check=True)
    return int(done.stdout)


def _await(broker: Broker) -> None:
    """Wait until the broker answers."""
    log = broker.directory / "broker.log"
    until = time.monotonic() + _PATIENCE
    while _alive(broker.pid, broker.directory) and time.monotonic() < until:
        if guarded.answers(broker.directory, broker.address) if broker.secure else _answers(broker.address):
            return
        time.sleep(0.1)
    lines = log.read_text(errors="replace").splitlines()
    wrong = [line for line in lines if " ERROR " in line or "Exception" in line] or lines[-1:] or ["it said nothing"]
    raise LogError(f"Kafka didn't come up: {wrong[0][:300]} (see {log})")


def _answers(address: str) -> bool:
    """Ask for a producer id (request 22, version 0): error 0 comes only once the broker and its coordinator are ready."""
    host, _, port = address.partition(":")
    none = (0xFFFF).to_bytes(2, "big")
    asked = (22).to_bytes(2, "big") + bytes(2) + bytes(4) + none + none + (60_000).to_bytes(4, "big")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2) as line:
        line.sendall(len(asked).to_bytes(4, "big") + asked)
        answer = line.recv(64)  # length, correlation id, throttle time, error code
        return len(answer) >= 14 and answer[12:14] == bytes(2)
    return False
