"""compose.yaml, as far as it can be checked without Docker: its commands are run, with processes in place of containers."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.federation import atoll, events
from tests.test_docs import parse

from atoll.plan import Plan

ROOT = Path(__file__).parents[1]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
NODES = ("north", "east", "south")
HOW_TO = (ROOT / "docs" / "how-to" / "compose.md").read_text()


def test_every_command_is_one_that_atoll_takes():
    for name in ("server", *NODES):
        parse(SERVICES[name]["command"])
    for words in re.findall(r"docker compose run --rm --no-deps server (.*)", HOW_TO):
        parse(words.split())


def test_images_have_versions_and_ports_stay_on_this_machine():
    base = re.search(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert base
    for image in (base[1], *(service["image"] for service in SERVICES.values())):
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+(-[a-z-]+)?", image), image
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"server": ["127.0.0.1:8740:8740"]}


def test_each_node_sees_its_own_rows_and_nothing_else():
    for name in NODES:
        rows, own = SERVICES[name]["volumes"]
        assert rows == f"./first/data/{name}.csv:/rows/{name}.csv:ro"
        assert own == f"{name}:/var/lib/atoll"
    assert not any(f"{name}.csv" in mount for name in NODES for mount in SERVICES["server"]["volumes"])


def test_the_image_installs_what_the_lock_file_says():
    """The one command that makes versions of the lock file finds every one of them, and the extras are there."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    script = re.search(r"RUN (sed .*) > /tmp/versions", dockerfile)
    assert script
    found = subprocess.run(["bash", "-c", script[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lock = (ROOT / "requirements.lock").read_text()
    assert [line.split("==")[0] for line in found.splitlines()] == re.findall(r"^([a-z0-9][^ ]*?)==", lock, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"'\.\[(.*?)\]'", dockerfile)
    assert extras
    assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()


@pytest.fixture
def first(tmp_path: Path, kafka: str) -> Path:
    """What the how-to's first two lines write, with the broker of the tests in place of the container's."""
    line = next(line for line in HOW_TO.splitlines() if "printf" in line).strip()
    subprocess.run([sys.executable, "-m", "atoll", "new", "first"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    plan = tmp_path / "first" / "plan.toml"
    assert Plan.load(plan).log.kafka == f"{SERVICES['kafka']['hostname']}:9092"
    text = plan.read_text().replace("kafka:9092", kafka)
    # A model that needs no compiling: the commands are what is tried here.
    text = re.sub(r"^keras = .*\nloss = .*$", "logistic = true", text, flags=re.MULTILINE)
    plan.write_text(text)
    assert Plan.load(plan).model.logistic
    return tmp_path / "first"


def test_its_commands_make_a_whole_run(first):
    def here(name: str, url: str = "") -> list[str]:
        """A container's command with this machine's folders and addresses."""
        words = " ".join(SERVICES[name]["command"])
        folders = {"/plan/": f"{first}/", "/rows/": f"{first}/data/", "/var/lib/atoll": f"{first}/at-{name}"}
        addresses = {"--host 0.0.0.0 --port 8740": "--host 127.0.0.1 --port 0", "http://server:8740": url}
        for there, instead in (folders | addresses).items():
            words = words.replace(there, instead)
        return [*words.split(), "--json"]

    with ExitStack() as stack:
        server = stack.enter_context(atoll(*here("server"), log=first / "server.log"))
        nodes = []
        for event in events(server):
            if event["what"] == "listening":
                nodes = [stack.enter_context(atoll(*here(name, event["url"]), log=first / f"{name}.log")) for name in NODES]
            if event["what"] == "history":
                assert [row["answered"] for row in event["rounds"]] == [["east", "north", "south"]] * 10
                assert event["rounds"][-1]["holdout"]["accuracy"] > 0.9
                assert [node.wait(20) for node in nodes] == [0, 0, 0]
                return
    raise AssertionError((first / "server.log").read_text())
