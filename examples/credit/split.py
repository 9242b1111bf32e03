"""Make a node's file for each of four lenders, and a holdout for the server, from UCI's german.data.

    python split.py FOLDER-WITH-GERMAN.DATA OUT

A lender has its own business: new cars, used cars, furniture and household, and everything else. So they differ in amounts, terms
and in how many of their loans go bad. Every fourth row of each goes to the holdout.
"""

from __future__ import annotations

import sys
from pathlib import Path

PURPOSE = 3
LENDERS = {"new-cars": {"A40"}, "used-cars": {"A41"}, "household": {"A42", "A43", "A44", "A45"}}


def lender(line: str) -> str:
    """Say whose loan a row is."""
    purpose = line.split()[PURPOSE]
    return next((name for name, purposes in LENDERS.items() if purpose in purposes), "other")


def main(source: Path, out: Path) -> None:
    """Write OUT/<lender>.csv and OUT/holdout.csv."""
    if not (source / "german.data").is_file():
        sys.exit(f"{source}: german.data is not there; README.md says where it comes from")
    out.mkdir(parents=True, exist_ok=True)
    lines = (source / "german.data").read_text().splitlines()
    held = []
    for name in (*LENDERS, "other"):
        rows = [",".join(line.split()) for line in lines if line.strip() and lender(line) == name]
        kept = [row for number, row in enumerate(rows) if number % 4 != 3]
        held += rows[3::4]
        (out / f"{name}.csv").write_text("\n".join(kept) + "\n")
        bad = sum(row.endswith(",2") for row in kept)
        print(f"{out / name}.csv: {len(kept)} loans, {bad} went bad")
    (out / "holdout.csv").write_text("\n".join(held) + "\n")
    print(f"{out / 'holdout.csv'}: {len(held)} loans")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python split.py FOLDER-WITH-GERMAN.DATA OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
