"""What nodes said in a round is kept as it was said; of what another version's nodes said, no sum is made."""

from __future__ import annotations

import json

import pytest

from atoll.errors import StoreError
from atoll.server import transcript
from atoll.server.transcript import Transcript

SAID = Transcript(2, "ab" * 32, (("keys", {"one": b"\x00\xff", "two": b""}), ("update", {"one": b""})))


def test_what_was_said_is_read_as_it_was_written(tmp_path):
    path = transcript.path_of(tmp_path, "run", 7)
    assert transcript.read(path) is None
    transcript.write(path, SAID)
    assert transcript.read(path) == SAID


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 1}, r"by a version of Atoll that masked otherwise \(1; this one: 2\); replay it"),
        ({"version": None}, "masked otherwise"),
        ({"said": [["keys", {"one": "?"}]]}, "can't be read"),
        ({"attempt": []}, "can't be read"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, change, said):
    path = transcript.path_of(tmp_path, "run", 7)
    transcript.write(path, SAID)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoreError, match=said):
        transcript.read(path)


def test_one_of_before_versions_were_written_down_is_refused(tmp_path):
    path = transcript.path_of(tmp_path, "run", 7)
    transcript.write(path, SAID)
    kept = json.loads(path.read_text())
    del kept["version"]
    path.write_text(json.dumps(kept))
    with pytest.raises(StoreError, match=r"\(1; this one: 2\)"):
        transcript.read(path)
