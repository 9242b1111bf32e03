"""What the commands print arrives whole, whatever stdout is."""

from __future__ import annotations

import io
import json
import os
import sys
import threading

from atoll.cli import buffered
from atoll.cli.show import printed


class Pipe(io.RawIOBase):
    """A pipe that takes a few bytes at a time."""

    def __init__(self) -> None:
        self.took = b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        self.took += bytes(data[:7])
        return min(7, len(data))


def test_a_long_line_goes_through_a_pipe_that_takes_little_at_a_time():
    pipe, line = Pipe(), "a line of JSON" * 100
    unbuffered = io.TextIOWrapper(pipe, encoding="utf-8", write_through=True)
    print(line, file=unbuffered)
    assert pipe.took == b"a line " + b"\n", "which is why"
    pipe.took = b""
    print(line, file=buffered(unbuffered))
    assert pipe.took.decode() == line + "\n", "the line is out by its end, without a flush"


def test_a_stream_that_has_a_buffer_stays_as_it_is():
    out = io.TextIOWrapper(io.BytesIO())
    assert buffered(out) is out


def test_a_pipe_that_nobody_reads_holds_up_no_work(monkeypatch):
    """A pipe takes 64 KiB: ten times as much is told, and only the end waits for a reader."""
    reading, writing = os.pipe()
    told, came = threading.Event(), list[str]()

    def read() -> None:
        told.wait(20)
        with os.fdopen(reading) as pipe:
            came.extend(pipe)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with printed() as tell:
            for number in range(6000):
                tell({"what": "round", "round": number, "more": "x" * 80})
            told.set()
    reader.join()
    assert [json.loads(line)["round"] for line in came] == list(range(6000))
