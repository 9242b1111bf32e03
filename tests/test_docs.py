"""The docs are true: every command, option, route, event, key and public name has its place, and the examples run."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

import atoll
from atoll import algorithms
from atoll.cli import whole
from atoll.messages import Message
from atoll.plan import Plan
from atoll.server import acting, http, page, uploads

ROOT = Path(__file__).parents[1]
DOCS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/*.md")]


def test_every_command_and_option_is_documented():
    page = DOCS["commands.md"]

    def walk(command: object, words: str) -> None:
        for name, below in getattr(command, "commands", {}).items():
            walk(below, f"{words} {name}")
        if not hasattr(command, "commands"):
            line = next((line for line in page.splitlines() if f"`{words}" in line), "")
            assert line, f"{words} is not in docs/commands.md"
            for option in command.params:  # type: ignore[attr-defined]
                longest = max(option.opts, key=len)
                if longest.startswith("--") and longest != "--help":
                    assert f"`{longest}" in line, f"{words}: {longest} is not in docs/commands.md"

    walk(typer.main.get_command(whole()), "atoll")


def parse(words: Sequence[str]) -> None:
    """Parse a command line as `atoll` would, without doing anything.

    Raises:
        click.UsageError: there is no such command or option, or an argument is missing.
    """
    command: Any = typer.main.get_command(whole())
    parent, rest = None, list(words)
    while getattr(command, "commands", None):
        parent = command.make_context("atoll", rest[:1], parent=parent)
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context("atoll", rest, parent=parent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_is_one_that_atoll_takes(page):
    for line in re.findall(r"^    (?:\.venv/bin/)?atoll +(.+)$", page.read_text(), re.MULTILINE):
        parse(shlex.split(line, comments=True))


def test_every_route_and_event_is_documented():
    protocol = DOCS["protocol.md"]
    paths = [route.path for route in [*http.routes(None), *page.routes(None), *acting.routes(None)]]  # type: ignore[arg-type]
    for path in [*paths, uploads.PATH.replace(":int", "")]:
        assert f"{path}`" in protocol, path
    for kind in Message.__subclasses__():
        row = next(line for line in protocol.splitlines() if line.startswith(f"| `{kind.event}` |"))
        for field in kind.model_fields:
            assert field == "v" or f"`{field}`" in row, f"{kind.event}.{field}"


def test_every_key_of_the_plan_is_documented():
    page = DOCS["plan.md"]
    for section, field in Plan.model_fields.items():
        assert f"## `[{section}]`" in page
        for key in field.annotation.model_fields:  # type: ignore[union-attr]
            assert f"`{key}`" in page, f"{section}.{key}"


def test_every_rule_and_its_options_are_documented():
    page = DOCS["plan.md"].splitlines()
    for rule, make in algorithms.known().items():
        row = next((line for line in page if line.startswith("|") and f"`{rule}`" in line.split("|")[1]), "")
        assert row, rule
        for option in inspect.signature(make).parameters:
            assert f"`{option}`" in row, f"{rule}: {option}"


def test_every_public_name_is_documented():
    for name in atoll.__all__:
        assert f"atoll.{name}" in DOCS["commands.md"], name
        assert getattr(atoll, name).__doc__


def test_the_readmes_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "accuracy" in done.stdout
    assert len(code.strip().splitlines()) <= 24


def test_simulate_is_a_function_whichever_way_it_is_reached():
    code = "import atoll.simulate, atoll; print(callable(atoll.simulate)); from atoll import simulate; print(callable(simulate))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\nTrue\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_tests_that_security_names_are_there():
    named = re.findall(r"`(tests/[^`]+)::(test_[^`]+)`", DOCS["security.md"])
    assert len(named) > 15
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
