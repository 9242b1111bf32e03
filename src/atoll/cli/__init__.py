"""The command line: thin; every command is a function over the public parts.

Enters: words and files. Leaves: tables for people, one JSON object as the last line for programs (`--json`),
and an exit code: 0 done, 2 a mistake that the one line on stderr explains, 3 a run that gave up, 130 stopped.
"""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
import warnings
from typing import Annotated, TextIO

import typer

from atoll import __version__
from atoll.errors import AtollError

STOPPED = 130
"""The exit code of a command that Ctrl-C ended."""

app = typer.Typer(
    help="Federated learning: models travel to the data, only protected updates travel back.\n\n"
    "Start with `atoll demo`, then `atoll new DIR`.",
    context_settings={"auto_envvar_prefix": "ATOLL", "help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(line)


def _version(asked: bool) -> None:
    if asked:
        print(f"atoll {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    log_level: Annotated[str, typer.Option(help="How much to log: debug, info, warning or error.")] = "warning",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log as one JSON object a line.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    del version
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise AtollError(f"--log-level: '{log_level}' is none; it is debug, info, warning or error")
    handler = logging.StreamHandler()
    if log_json:
        handler.setFormatter(_Json())
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("atoll").setLevel(level)


def buffered(out: TextIO) -> TextIO:
    """Give a stream without a buffer one, flushed at each line: of an unbuffered write Python drops what a pipe doesn't take.

    So it is under PYTHONUNBUFFERED=1, where a pipe was seen to take the first 64 KiB only once a uvloop had run.
    """
    raw = getattr(out, "buffer", None)
    if not isinstance(raw, io.RawIOBase):
        return out
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=out.encoding, errors=out.errors, line_buffering=True)


def whole() -> typer.Typer:
    """Return the command line with every command in it."""
    from atoll.cli import (  # noqa: F401  each adds its commands to `app`
        audit,
        bench,
        demo,
        doctor,
        kafka,
        keep,
        ledger,
        look,
        nodes,
        owner,
        partition,
        privacy,
        run,
        simulate,
        start,
        sweep,
        viewers,
    )

    return app


def main() -> None:
    """Run the command line; a person's mistake ends in one line, not in a traceback."""
    sys.stdout = buffered(sys.stdout)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a request to terminate is a Ctrl-C: what was begun is tidied up
    # A run that diverges says so itself, in one line.
    warnings.filterwarnings("ignore", "(overflow|invalid value|divide by zero) encountered", RuntimeWarning)
    run = whole()
    try:
        if run(standalone_mode=False) == STOPPED:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
    except AtollError as error:
        sys.stdout.flush()
        print(f"atoll: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("atoll: stopped", file=sys.stderr)
        sys.exit(STOPPED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have one
            raise
        print(f"atoll: {error.format_message()}  (--help shows what there is)", file=sys.stderr)
        sys.exit(2)
