"""Atoll: federated learning. Models travel to the data; only protected updates travel back.

The names below load what they need when they are first used, so that `import atoll` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoll.errors import AtollError
    from atoll.node.runtime import Node
    from atoll.plan import Plan
    from atoll.server.runtime import Server
    from atoll.simulate import Simulated, simulate

__version__ = "0.1.0"
__all__ = ["AtollError", "Node", "Plan", "Server", "Simulated", "simulate"]

_HOMES = {
    "AtollError": "atoll.errors",
    "Node": "atoll.node.runtime",
    "Plan": "atoll.plan",
    "Server": "atoll.server.runtime",
    "Simulated": "atoll.simulate",
    "simulate": "atoll.simulate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atoll' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
