"""What the record of a run says: an entry of plain facts for each thing that happens, made from the rows stored with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from atoll.chain import canonical
from atoll.store import RoundRow, RunRow, UpdateRow

Entry = dict[str, Any]


def begun(row: RunRow, key: str, closed: int | None = None) -> Entry:
    """A run begins: its plan, its initial model, the server's key; or goes on after `closed` rounds that have no record."""
    facts = {"run": row.run, "name": row.name, "plan": row.plan_digest, "initial": row.initial}
    return {"what": "begun", **facts, "key": key, **({} if closed is None else {"closed": closed})}


def admitted(node: str, name: str, key: str) -> Entry:
    """A node is let in, or goes by another name."""
    return {"what": "admitted", "node": node, "name": name, "key": key}


def revoked(node: str) -> Entry:
    """The operator took a node's admission back."""
    return {"what": "revoked", "node": node}


def opened(facts: Mapping[str, Any]) -> Entry:
    """A try of a round begins: see `RunRow.opened`."""
    return {"what": "opened", **facts}


def refused(row: UpdateRow) -> Entry:
    """Something came that doesn't count, or a node declined."""
    facts = {"round": row.round, "attempt": row.attempt, "node": row.node, "status": row.status}
    seen = {"digest": row.digest, "bytes": row.bytes, "reason": row.reason}
    more = {name: value for name, value in (("norm", row.norm), ("offence", row.offence)) if value}
    return {"what": "refused", **facts, **seen, **more}


def closed(row: RoundRow, updates: Sequence[UpdateRow]) -> Entry:
    """A round is closed: what was folded, in that order, and what came of it; `rows` stands for all else that is stored of it.

    Of an update that is for an earlier round, that and its attempt are told as well.
    """
    facts = {"round": row.round, "attempt": row.attempt, "model": row.model, "state": row.state}
    accepted = [[one.node, one.digest, *((one.round, one.attempt) if one.folded else ())] for one in updates]
    return {"what": "closed", **facts, "accepted": accepted, "rows": rows_digest(row, updates)}


def ended(outcome: str, reason: str) -> Entry:
    """The run is over, unless another server goes on with it."""
    return {"what": "ended", "outcome": outcome, "reason": reason}


def rows_digest(row: RoundRow, updates: Sequence[UpdateRow]) -> str:
    """Return the SHA-256 (hex) of a round's rows, the same before they are stored and after."""
    return hashlib.sha256(canonical(_plain([_facts(row), *map(_facts, updates)])).encode()).hexdigest()


def _facts(row: RoundRow | UpdateRow) -> dict[str, Any]:
    """A row without the columns that older records don't know, where these say nothing; and of a key only its digest."""
    unknown = ("norm", "offence", "reference", "folded", "epsilon", "noise", "dissimilarity", "cosine", "fetched")
    facts = {name: value for name, value in vars(row).items() if value or name not in unknown}
    if noise := facts.get("noise"):
        key = noise["key"]
        told = hashlib.sha256(bytes.fromhex(key)).hexdigest() if key else noise["digest"]
        facts["noise"] = {**noise, "key": None, "digest": told}
    return facts


def _plain(value: Any) -> Any:
    """Return a value with every number as a float: a database may give a whole number back as one."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return float(value) if isinstance(value, int) else value
