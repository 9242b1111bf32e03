"""`atoll new`: a plan, a model and a README to start from."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli import app, demo_data
from atoll.cli.show import working
from atoll.errors import AtollError


@app.command()
def new(
    directory: Annotated[Path, typer.Argument(help="Where to write; it must be new or empty.")],
) -> None:
    """Write a plan, a model and a README to start from, with rows to try them on where scikit-learn is installed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise AtollError(f"{directory}: is not empty; name a new directory, so that nothing is overwritten")
        with as_file(files("atoll.cli") / "template") as folder:
            for source in sorted(folder.iterdir()):
                (directory / source.name).write_bytes(source.read_bytes())
    except OSError as error:
        raise AtollError(f"{directory}: can't be written ({error.strerror}); name another directory") from error
    print(f"{directory}: plan.toml, model.json, README.md")
    try:
        with working("writing rows"):
            demo_data.write(directory / "data", 3, 7)
    except AtollError as error:
        print(f"no rows to try them on: {error}")
    else:
        print(f"{directory / 'data'}: three hospitals' rows, and holdout.csv for the server")
    print(f"next: cd {directory}; atoll serve plan.toml --holdout data/holdout.csv")
