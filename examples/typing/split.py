"""A play → a table for each of its speakers, and the server's holdout.

    python split.py PLAY.txt OUT [--speakers 20]

The play is text in which a line `NAME:` says who speaks, until an empty line. What each says is cut into pieces of at most 80
characters, between words. The last fifth of each speaker's pieces goes to the holdout; speakers are those who say most.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

LENGTH = 80


def speeches(text: str) -> dict[str, list[str]]:
    """Return what each speaker says, as pieces, in the order of the play."""
    found: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        name, _, said = block.strip().partition(":\n")
        if said:
            found.setdefault(re.sub(r"\W+", "-", name.lower()).strip("-"), []).extend(
                textwrap.wrap(" ".join(said.split()), LENGTH)
            )
    return found


def main(play: Path, out: Path, speakers: int) -> None:
    """Write OUT/SPEAKER.csv for each, and OUT/holdout.csv."""
    found = speeches(play.read_text(encoding="utf-8"))
    if not found:
        sys.exit(f"{play}: holds no line NAME: with what is said below it; README.md shows the form")
    out.mkdir(parents=True, exist_ok=True)
    held = []
    for name in sorted(found, key=lambda name: -len(found[name]))[:speakers]:
        cut = -(-4 * len(found[name]) // 5)
        held += found[name][cut:]
        _write(out / f"{name}.csv", found[name][:cut])
    _write(out / "holdout.csv", held)


def _write(path: Path, pieces: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([piece] for piece in pieces)])
    print(f"{path}: {len(pieces)} pieces")


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description="A play → a table for each of its speakers.")
    asked.add_argument("play", type=Path)
    asked.add_argument("out", type=Path)
    asked.add_argument("--speakers", type=int, default=20)
    main(**vars(asked.parse_args()))
