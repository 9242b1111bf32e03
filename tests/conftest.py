"""What all tests share: where real data is, and that under ATOLL_STRICT=1 nothing is skipped unseen."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tests.browser import Browser, find

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("MPLBACKEND", "Agg")

STRICT = os.environ.get("ATOLL_STRICT") == "1"

# Under strict rules the same examples every time, so that a change never fails for a chance found elsewhere.
settings.register_profile("atoll", deadline=None, derandomize=STRICT, print_blob=True)
settings.load_profile("atoll")


# PyTorch is in no lock file but its own (it is large), so what needs it is left out of a run without it, not skipped.
HERE = importlib.util.find_spec("torch") is not None
collect_ignore_glob = [] if HERE else ["learners/*torch*.py"]


def pytest_report_header() -> str | None:
    return None if HERE else "PyTorch is not installed here: `make test-torch` runs tests/learners/test_torch*.py"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets, which `$ATOLL_DATA` names; without it the test is skipped."""
    named = os.environ.get("ATOLL_DATA")
    if not named:
        pytest.skip("no real data: ATOLL_DATA names no folder")
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f"no real data: ATOLL_DATA is {folder}, which is no folder")
    return folder


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not STRICT or not report.skipped or hasattr(report, "wasxfail"):
        return
    path, line, reason = report.longrepr if isinstance(report.longrepr, tuple) else ("", 0, str(report.longrepr))
    report.outcome = "failed"
    report.longrepr = f"{reason.removeprefix('Skipped: ')} [{path}:{line}; a skip, which ATOLL_STRICT=1 forbids]"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test into a failed one."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a skipped module into a failed one."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Kafka, started once for the whole run of tests."""
    if not (shutil.which("java") and (shutil.which("mvn") or os.environ.get("ATOLL_KAFKA_JARS"))):
        pytest.skip("needs Java 17 and Maven: apt install openjdk-17-jre-headless maven")
    from atoll.logs import broker

    place = tmp_path_factory.mktemp("kafka")
    running = broker.start(place, report=print)
    yield running.address
    broker.stop(place)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium, started once for the whole run of tests."""
    program = find()
    if program is None:
        pytest.skip("needs Chromium: apt install chromium")
    running = Browser(program, tmp_path_factory.mktemp("browser"))
    yield running
    running.close()
