"""Make a node's file for each hospital, and a holdout for the server, from UCI's four files.

    python split.py FOLDER-OF-UCI-FILES OUT

Every fourth row of each hospital goes to the holdout; nothing else is changed.
"""

from __future__ import annotations

import sys
from pathlib import Path

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")


def main(source: Path, out: Path) -> None:
    """Write OUT/<hospital>.csv and OUT/holdout.csv."""
    missing = [name for name in HOSPITALS if not (source / f"processed.{name}.data").is_file()]
    if missing:
        sys.exit(f"{source}: processed.{missing[0]}.data is not there; README.md says where it comes from")
    out.mkdir(parents=True, exist_ok=True)
    held = []
    for name in HOSPITALS:
        lines = (source / f"processed.{name}.data").read_text().splitlines(keepends=True)
        held += lines[3::4]
        kept = [line for number, line in enumerate(lines) if number % 4 != 3]
        (out / f"{name}.csv").write_text("".join(kept))
        print(f"{out / name}.csv: {len(kept)} rows")
    (out / "holdout.csv").write_text("".join(held))
    print(f"{out / 'holdout.csv'}: {len(held)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python split.py FOLDER-OF-UCI-FILES OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
