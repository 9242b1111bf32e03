"""Each foreign library has one home, and what must be pure reaches for nothing impure.

Ranks among Atoll's own modules are import-linter's (pyproject.toml); here are the rules about everything else.
A home is a module, or a folder with all that lies in it: "atoll.logs" holds atoll.logs.kafka.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FLOOR = "atoll.cli.bench.floor"
"""What Atoll is measured against is written by hand from bare parts, and so imports them itself."""
SERVING = (
    FLOOR,
    "atoll.server.served",
    "atoll.server.channel",
    "atoll.server.lines",
    "atoll.server.http",
    "atoll.server.uploads",
    "atoll.server.page",
    "atoll.server.viewing",
    "atoll.server.acting",
)

HOMES: Mapping[str, Sequence[str]] = {
    "numpy": ("atoll",),
    "cryptography": ("atoll.keys", "atoll.tls"),
    "pydantic": (
        "atoll.plan",
        "atoll.columns",
        "atoll.guards",
        "atoll.sections",
        "atoll.training",
        "atoll.stages",
        "atoll.stopping",
        "atoll.messages",
        "atoll.node.policy",
        "atoll.simulate.devices",
        "atoll.simulate.checkpoint",
    ),
    "safetensors": ("atoll.wire",),
    "keras": ("atoll.learners.keras",),
    "h5py": ("atoll.learners.keras",),
    "jax": (
        "atoll.learners.keras",
        "atoll.learners.jax",
        "atoll.learners.networks",
        "atoll.simulate",
        "atoll.cli.bench.floor_simulate",
    ),
    "optax": ("atoll.learners.jax",),
    "tensorflow": ("atoll.learners.keras",),
    "torch": ("atoll.learners.torch", "atoll.learners.keras"),
    "functorch": ("atoll.learners.torch",),
    "xgboost": ("atoll.learners.trees",),
    "sklearn": ("atoll.learners.sklearn", "atoll.cli.demo_data"),
    "ray": ("atoll.simulate.ray",),
    "dp_accounting": ("atoll.privacy.dp.accountant",),
    "aiohttp": (
        "atoll.logs",
        "atoll.node.runtime",
        "atoll.node.download",
        "atoll.node.offer",
        "atoll.node.outbox",
        "atoll.node.sums",
        "atoll.node.tasks",
        "atoll.node.trust",
        FLOOR,
        "atoll.cli.bench.connect",
    ),
    "confluent_kafka": ("atoll.logs.kafka", "atoll.logs.topics", "atoll.logs.users", FLOOR),
    "sqlalchemy": ("atoll.store", "atoll.preprocess.database"),
    "pyarrow": ("atoll.preprocess.parquet",),
    "tenseal": ("atoll.privacy.ckks",),
    "zstandard": ("atoll.privacy.ckks",),
    "PIL": ("atoll.preprocess.images",),
    "socketio": ("atoll.node.channel",),
    "starlette": SERVING,
    "jinja2": ("atoll.server.page",),
    "uvicorn": ("atoll.server.web", FLOOR),
    "wsproto": ("atoll.server.web",),
    "uvloop": ("atoll.drive",),
    "typer": ("atoll.cli",),
    "rich": ("atoll.cli",),
    "matplotlib": ("atoll.cli",),
    "pytest": ("atoll.testing",),
    "hypothesis": ("atoll.testing",),
}
"""Foreign library → the only modules that import it. A library that stands here nowhere is imported nowhere."""

PURE = ("machine", "close", "draw", "ending", "events", "means", "phases", "state", "tries")
"""Last names of the modules, in any folder, that decide and compute and touch nothing."""

IMPURE = frozenset(
    (
        "asyncio",
        "concurrent",
        "http",
        "io",
        "logging",
        "multiprocessing",
        "os",
        "pathlib",
        "queue",
        "random",
        "secrets",
        "select",
        "selectors",
        "shutil",
        "signal",
        "socket",
        "sqlite3",
        "ssl",
        "subprocess",
        "tempfile",
        "threading",
        "time",
        "urllib",
        "uuid",
    )
)
"""What a pure module never imports; nor does it import any foreign library but numpy."""

NOWHERE = frozenset(("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"))
"""No code on the wire, nor on disk."""


def modules() -> list[tuple[str, ast.Module]]:
    """Return every module of the package, by name."""
    found = []
    for path in sorted((SOURCE / "atoll").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported module's name and its line; also those inside functions and `if TYPE_CHECKING`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def faults(name: str, tree: ast.AST) -> list[str]:
    """Return what a module imports and must not, one line each."""
    pure = name.rpartition(".")[2] in PURE
    wrong = []
    for imported, line in imports(tree):
        top = imported.partition(".")[0]
        if top in {"atoll", "__future__"}:
            continue
        why = None
        if top in NOWHERE:
            why = "is allowed nowhere: no code on the wire"
        elif pure and top in IMPURE:
            why = "is impure; time, randomness, ids and bytes are arguments here"
        elif pure and top not in sys.stdlib_module_names and top != "numpy":
            why = "is foreign, and a pure module needs none"
        elif top not in sys.stdlib_module_names and top not in HOMES:
            why = "has no home; give it one in HOMES"
        elif top in HOMES and not any(f"{name}.".startswith(f"{home}.") for home in HOMES[top]):
            why = f"lives in {', '.join(HOMES[top])} only"
        if why:
            wrong.append(f"{name}, line {line}: {imported} {why}")
    return wrong


def test_every_foreign_library_stays_at_home() -> None:
    package = modules()
    assert package, f"{SOURCE} holds no package"
    wrong = [fault for name, tree in package for fault in faults(name, tree)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("atoll.wire", "import cryptography.fernet"),
        ("atoll.algorithms.fedavg", "def f():\n    from jax import numpy"),
        ("atoll.keysmith", "from cryptography import x509"),
        ("atoll.server.close", "import time"),
        ("atoll.node.machine", "from asyncio import sleep"),
        ("atoll.peers.machine", "import aiohttp"),
        ("atoll.store.sql", "import pickle"),
        ("atoll.learners.sklearn", "import_module('scipy.stats')"),
    ],
)
def test_a_fault_is_found(name: str, source: str) -> None:
    assert len(faults(name, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("atoll.keys", "from cryptography import x509"),
        ("atoll.logs.kafka", "import confluent_kafka"),
        ("atoll.cli", "import typer"),
        ("atoll.server.close", "import numpy as np, math, dataclasses"),
    ],
)
def test_a_home_is_no_fault(name: str, source: str) -> None:
    assert faults(name, ast.parse(source)) == []
