"""UCI's labelled sentences → a table for each source, and the server's holdout.

    python split.py FOLDER OUT

The folder holds `NAME_labelled.txt`, each line a sentence, a tab, and 1 (kind) or 0. Every fifth line goes to the holdout.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

ENDING = "_labelled.txt"


def main(source: Path, out: Path) -> None:
    """Write OUT/NAME.csv for each source, and OUT/holdout.csv."""
    files = sorted(source.glob(f"*{ENDING}"))
    if not files:
        sys.exit(f"{source}: holds no file NAME{ENDING}; README.md says where they come from")
    out.mkdir(parents=True, exist_ok=True)
    held = []
    for path in files:
        # Some sentences hold other signs that Python takes for the end of a line.
        lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").split("\n") if line]
        held += lines[4::5]
        _write(out / f"{path.name.removesuffix(ENDING)}.csv", [line for at, line in enumerate(lines) if at % 5 != 4])
    _write(out / "holdout.csv", held)


def _write(path: Path, lines: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence", "kind"), *lines])
    print(f"{path}: {len(lines)} sentences")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python split.py FOLDER OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
