"""Atoll: federated learning. Models travel to the data; only protected updates travel back."""

from __future__ import annotations

__version__ = "0.1.0"
