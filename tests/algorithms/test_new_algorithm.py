"""The how-to's algorithm, as it stands in the page: found by its entry point, checked, and run simulated and deployed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from tests.federation import clients, plan, run

from atoll.algorithms import find, known
from atoll.errors import PlanError
from atoll.learners import build
from atoll.preprocess import prepare
from atoll.simulate import simulate

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "new-algorithm.md").read_text()
MODULE, CHECK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
REGISTERED, WANTED = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's module, as a package that is installed: its metadata lie beside it, as pip leaves them."""
    (tmp_path / "calm.py").write_text(MODULE)
    about = tmp_path / "calm-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: calm\nVersion: 1.0\n")
    group, *entries = REGISTERED.strip().splitlines()
    assert group == '[project.entry-points."atoll.algorithms"]'
    (about / "entry_points.txt").write_text("\n".join(["[atoll.algorithms]", *entries]).replace('"', ""))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("calm", None)


@pytest.mark.usefixtures("installed")
def test_twenty_lines_are_an_algorithm(tmp_path):
    assert "calm" in known()
    agreed = plan(aggregation={"rule": "calm", "options": {"power": 2.0}})
    assert 'rule = "calm"' in WANTED
    assert "power = 2.0" in WANTED
    scope = {"plan": agreed, "data": [prepare(one, agreed) for one in clients().values()], "calm": known()["calm"]}
    exec(CHECK, scope)  # the page's own lines
    simulated = simulate(agreed, clients())
    assert run(agreed, clients(), tmp_path / "run")["last"] == simulated.digest
    assert simulated.digest != simulate(plan(), clients()).digest
    wrong = plan(aggregation={"rule": "calm", "options": {"pover": 2.0}})
    with pytest.raises(PlanError, match="'calm' has no such option; did you mean 'power'"):
        find(wrong, build(wrong))


def test_it_is_no_more_than_that():
    code = [line for line in MODULE.split("def counter")[0].splitlines() if line.strip() and not line.strip().startswith('"""')]
    assert len(code) <= 20
