"""What a node doesn't do for a task, whoever asks."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from tests.federation import plan, rows

from atoll.errors import PrivacyError
from atoll.keys import Identity
from atoll.messages import StartTraining
from atoll.node.outbox import Outbox
from atoll.node.runtime import Node
from atoll.node.tasks import Steps, Tasks
from atoll.store.ledger import Ledger
from atoll.wire import Address, seal

TASK = StartTraining(run="r", round=1, attempt=1, model="0" * 64, deadline=9.0)


def test_a_task_for_a_run_of_another_name_is_no_task(tmp_path):
    node = Node("http://127.0.0.1:9", rows(0), directory=tmp_path)
    node.run = "the one that the server said"
    with pytest.raises(PrivacyError, match="it asks for an update to run r, and said that this is the one that the server said"):
        asyncio.run(node.start_training(TASK))
    node.ledger.close()


def test_the_update_of_a_try_is_made_once(tmp_path):
    """It left, was judged and let go of: another one would be noise drawn anew, or other masks, for the same numbers."""
    ledger, identity = Ledger(tmp_path), Identity.new()
    address = Address("r", 1, 1, identity.node)
    ledger.leaving(seal(identity, address, plan().digest, [b"an update"]), 0.0)
    host: Any = SimpleNamespace(ledger=ledger, outbox=Outbox(tmp_path / "outbox"))
    steps: Any = Steps(*(None,) * 3, address=lambda task: address, tell=None)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="the update of attempt 1 of round 1 left already, and is made once"):
        asyncio.run(Tasks(host, steps).made(TASK))
    ledger.close()
