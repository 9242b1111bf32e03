"""The status page and the metrics, as text: what they show of runs that go on, went on, went wrong, or went on for long."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import insert
from tests.federation import clients, plan, rows

from atoll.learner import Rows
from atoll.messages import StartTraining
from atoll.node.runtime import Node
from atoll.server import events, machine
from atoll.server.page import Pages, view
from atoll.server.page.curve import HEIGHT, WIDTH, chart
from atoll.server.page.past import POINTS
from atoll.server.runtime import Server
from atoll.server.status import status
from atoll.store import EvaluationRow, NodeRow, RoundRow, RunRow, UpdateRow, sql
from atoll.store.database import MEMORY
from atoll.store.sql import SqlStore
from atoll.wire import Address

HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"


def dots(page: str, figure: str) -> dict[str, dict[int, float]]:
    """Series → round → value, of one chart."""
    found = re.search(rf'data-figure="{figure}".*?</svg>', page, re.DOTALL)
    series = re.findall(r'data-series="([^"]*)">(.*?)</g>', found[0], re.DOTALL) if found else []
    circle = r'data-round="(\d+)" data-value="([^"]+)"'
    return {label: {int(at): float(value) for at, value in re.findall(circle, drawn)} for label, drawn in series}


def sums(loss: float, right: float | None = 5.0) -> dict[str, float]:
    return {"samples": 10.0, "loss": 10 * loss, **({} if right is None else {"correct": right})}


class Stored:
    """A site over a store of its own, which runs nothing unless it is told so."""

    def __init__(self, place: str | Path, present: Mapping[str, Any] | None = None) -> None:
        self.store, self.run, self.present = SqlStore(place), "r1" if present else "now", present

    def status(self) -> dict[str, Any]:
        assert self.present
        return dict(self.present)

    def begin(self, run: str = "r1", rounds: int = 3, started: float = 100.0) -> None:
        self.store.begin_run(RunRow(run, "heart", "d" * 64, plan(plan={"rounds": rounds}).to_json(), started, "m0"))

    def page(self, run: str = "r1", **which: int) -> str:
        return asyncio.run(Pages(self).page(run, view.Which(**which)))


def closed(number: int, evaluations: list[EvaluationRow]) -> tuple[RoundRow, list[UpdateRow], list[EvaluationRow]]:
    row = RoundRow("r1", number, 1, 100.0, 0.5, f"{number:064x}", f"{number:064x}", 1, 1, 80)
    return row, [UpdateRow("r1", number, 1, "n1", "accepted", "u", 80, 0.1, 7.0)], evaluations


def test_the_page_says_how_nodes_differ_or_why_that_is_not_seen(tmp_path: Path):
    apart = {"accuracy": {"worst": 0.25, "node": "n1", "tenth": 0.3, "deviation": 0.125, "nodes": 2}}
    site = Stored(tmp_path)
    site.begin()
    site.store.saw_node(NodeRow("r1", "n1", "north", "k", 1.0, 1.0))
    row, updates, _ = closed(1, [])
    judged = [EvaluationRow("r1", 0, "nodes", sums(0.5)), EvaluationRow("r1", 0, "spread", apart)]
    site.store.close_round(replace(row, dissimilarity=1.75), [replace(updates[0], cosine=-0.5)], judged)
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", site.page()))
    assert "cosine -0.50 to the mean" in page
    assert "accuracy 0.5000 0.2500 0.3000 0.1250 worst: north, of 2 nodes" in page
    assert "dissimilarity 1.7500" in page
    (history,) = site.store.history("r1")["rounds"]
    assert history["dissimilarity"] == 1.75
    assert history["drift"] == {"north": {"norm": None, "cosine": -0.5}}
    assert site.store.history("r1")["initial_evaluation"].keys() == {"nodes"}
    hidden = json.dumps({**json.loads(plan().to_json()), "privacy": {"secure_aggregation": True}})
    site.store.begin_run(RunRow("r2", "heart", "d" * 64, hidden, 200.0, "m0"))
    assert "Not visible: the plan&#39;s secure aggregation hides single updates and figures." in site.page("r2")


def test_a_live_run_shows_its_rounds_its_nodes_and_its_models(tmp_path: Path):
    async def together() -> tuple[dict[str, Any], list[str], bytes, Any]:
        pages: list[str] = []
        server = Server(plan(), holdout=Rows(*rows(9)), store=tmp_path / "store", port=0)
        went_on = asyncio.Event()

        class Slow(Node):
            async def start_training(self, task: StartTraining) -> None:
                if task.round == 3:
                    await went_on.wait()
                await super().start_training(task)

        async def watch() -> tuple[bytes, Any]:
            async with aiohttp.ClientSession(server.url) as session:
                while "Round 3 of 3: training" not in (pages or [""])[-1] or "2 update is in" not in pages[-1]:
                    async with session.get("/") as answer:
                        pages.append(await answer.text())
                    await asyncio.sleep(0.05)
                (href,) = re.findall(r'id="model-best" href="([^"]+)"', pages[-1])
                async with session.get(href) as answer:
                    model, headers = await answer.read(), answer.headers
                async with session.get("/") as answer:
                    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
                async with session.post("/") as answer:
                    assert answer.status == 405
                async with session.get("/runs/unheard-of") as answer:
                    assert answer.status == 404
            went_on.set()
            return model, headers

        nodes = [
            (Slow if name == "node-2" else Node)(server.url, data, name=name, directory=tmp_path / name)
            for name, data in clients().items()
        ]
        history, (model, headers), *_ = await asyncio.gather(
            server.serve_async(), watch(), *(node.start_async() for node in nodes)
        )
        return history, pages, model, headers

    history, pages, model, headers = asyncio.run(asyncio.wait_for(together(), 60))
    page = pages[-1]
    assert "· fedavg ·" in page
    losses = {0: history["initial_evaluation"]["holdout"]["loss"]} | {
        row["round"]: row["holdout"]["loss"] for row in history["rounds"][:2]
    }
    assert dots(page, "loss")["server&#39;s holdout"] == losses
    accuracies = {0: history["initial_evaluation"]["nodes"]["accuracy"], 1: history["rounds"][0]["nodes"]["accuracy"]}
    assert dots(page, "accuracy")["nodes&#39; own rows"] == accuracies
    assert "round 3: 2 of 3 updates are in, waiting for node-2" in page
    assert re.search(r'class="training">.*?<b>node-2</b>', page, re.DOTALL)
    assert len(re.findall(r'class="answered"', page)) == 2
    facts = re.findall(r'<b>node-0</b>.*?class="facts">([^<]+)<', page, re.DOTALL)[0]
    accuracy = history["rounds"][0]["by_node"]["node-0"]["accuracy"]
    assert re.fullmatch(
        rf"round 2: \d+ Bytes in [\d.]+ s, cosine 0\.\d\d to the mean; accuracy {accuracy:.4f} on its own rows", facts
    )
    assert hashlib.sha256(model).hexdigest() == history["rounds"][1]["model"]
    assert "immutable" in headers["Cache-Control"]


def test_a_page_runs_its_own_script_and_style_and_nothing_else(tmp_path: Path):
    from atoll.server.page import HEADERS

    site = Stored(tmp_path, machine_status())
    site.begin()
    page = site.page()
    assert re.search(r"<b>beta</b>\s*<span class=\"what\">sending</span>\s*75 %", page)
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        said = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{said}'" in HEADERS["Content-Security-Policy"]
    assert not re.findall(r'\sstyle=|\son\w+=|(?:src|href)="(?:https?:)?//', page)
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def machine_status(**more: Any) -> dict[str, Any]:
    """The state of a run with a node that declined for a hostile reason."""
    state, _ = machine.begin("r1", plan(cohort={"minimum": 2}), "0" * 64, 0.0)
    state, _ = machine.transition(state, events.Joined(0.0, {"a": "alpha", "b": "beta"}))
    state, _ = machine.transition(state, events.Declined(1.0, Address("r1", 1, 1, "a"), HOSTILE))
    return {"plan": "heart", **status(state, 1.0, 1000.0, {}, {"b": (30, 40)}, {}, log=None, store=None), **more}


def test_what_others_wrote_is_text_and_never_markup(tmp_path: Path):
    present = machine_status()
    present["nodes"].append({**present["nodes"][0], "name": HOSTILE})
    site = Stored(tmp_path, present)
    site.begin()
    site.store.saw_node(NodeRow("r1", "n1", HOSTILE, "k", 1.0, 1.0))
    site.store.record_update(UpdateRow("r1", 1, 1, "n1", "declined", reason=HOSTILE))
    site.store.close_round(*closed(1, []))
    site.store.record_update(UpdateRow("r1", 2, 1, "n1", "rejected", reason=HOSTILE))
    site.store.end_run("r1", HOSTILE, HOSTILE, 200.0)
    for page in (site.page(), Stored(tmp_path).page()):
        assert "<script>alert" not in page
        assert "49" not in re.findall(r"alert\(1\).{0,60}", page)[0]
        assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;{{ 7 * 7 }}") >= 4


def test_each_node_says_what_it_does():
    found = {one["name"]: one for one in machine_status()["nodes"]}
    assert (found["alpha"]["doing"], found["alpha"]["reason"]) == ("declined", HOSTILE)
    assert {key: found["beta"][key] for key in ("doing", "received", "size", "waited_for")} == {
        "doing": "sending", "received": 30, "size": 40, "waited_for": True,
    }  # fmt: skip
    state, _ = machine.begin("r1", plan(cohort={"minimum": 1}), "0" * 64, 0.0)
    state, _ = machine.transition(state, events.Joined(0.0, {"a": "alpha"}))
    state, _ = machine.transition(state, events.Joined(0.0, {"b": "late"}))
    state, _ = machine.transition(state, events.Lost(2.0, "a"))
    seen = status(state, 2.0, 1002.0, {"a": 1001.5}, {}, {}, log="the broker is away", store=None)
    alpha, late = seen["nodes"]
    assert (alpha["doing"], alpha["since"], alpha["waited_for"]) == ("lost", 1001.5, True)
    assert late["doing"] == "idle"
    assert (seen["until"], seen["needed"]) == (1000.0 + plan().cohort.deadline, 1)
    assert seen["waiting_for"].endswith("the broker is away")


def test_who_is_late_is_said_for_which_round_and_counted(tmp_path: Path):
    """Node c trains on when round 1 closes without it, and is at work for round 1 while round 2 is open."""
    names = {node: f"name-{node}" for node in "abc"}
    state, _ = machine.begin("r1", plan(cohort={"minimum": 2, "quorum": 0.6, "grace": 0}), "0" * 64, 0.0)
    happened: list[events.Event] = [events.Joined(0.0, names)]
    happened += [events.Appended(1.0, Address("r1", 1, 1, node), node) for node in "ab"]
    for event in (*happened, events.Closed(2.0, "1" * 64)):
        state, _ = machine.transition(state, event)
    seen = status(state, 3.0, 1003.0, {}, {}, {}, log=None, store=None)
    assert [(one["name"], one["round"], one["doing"]) for one in seen["nodes"]] == [
        ("name-a", 2, "training"), ("name-b", 2, "training"), ("name-c", 1, "training"),
    ]  # fmt: skip
    assert "name-c (since round 1)" in seen["waiting_for"]
    site = Stored(tmp_path, {"plan": "heart", **seen})
    site.begin()
    site.store.close_round(*closed(1, []))
    row, updates, judged = closed(2, [])
    site.store.close_round(row, [replace(updates[0], round=1, folded=2)], judged)
    page = site.page()
    assert page.count("training for round 1") == 1
    assert page.count(", 1 late") == 1


def test_losses_that_are_no_number_break_the_curve_and_are_counted(tmp_path: Path):
    site = Stored(tmp_path)
    site.begin(rounds=5)
    for number, loss in enumerate((0.9, math.nan, 0.5, math.inf, 0.7), 1):
        site.store.close_round(*closed(number, [EvaluationRow("r1", number, "holdout", sums(loss, None))]))
    page = site.page()
    assert dots(page, "loss") == {"server&#39;s holdout": {1: 0.9, 3: 0.5, 5: 0.7}}
    assert "No number in 2 rounds: 2, 4." in page
    assert 'data-figure="accuracy"' not in page
    assert re.findall(r'id="model-best" href="/v1/models/(\w+)"', page) == [f"{3:064x}"]
    assert "nan" in page.lower()
    assert site.store.history("r1")["best"] == f"{3:064x}"


def test_what_a_plan_judges_by_has_a_curve_of_its_own(tmp_path: Path):
    site = Stored(tmp_path)
    agreed = plan(stopping={"metric": "recall"})
    site.store.begin_run(RunRow("r1", "heart", "d" * 64, agreed.to_json(), 1.0, "m0"))
    counts = {"true_positive": 3.0, "false_positive": 1.0, "false_negative": 1.0, "metric.brier": 2.0}
    for number in (1, 2):
        found = {**sums(0.5 / number), **counts, "false_negative": 2.0 - number}
        site.store.close_round(*closed(number, [EvaluationRow("r1", number, "holdout", found)]))
    page = site.page()
    assert re.findall(r'data-figure="(\w+)"', page) == ["loss", "accuracy", "recall", "brier"]
    assert dots(page, "recall")["server&#39;s holdout"] == {1: 0.75, 2: 1.0}
    assert dots(page, "brier")["server&#39;s holdout"] == {1: 0.2, 2: 0.2}
    assert re.findall(r'id="model-best" href="/v1/models/(\w+)"', page) == [f"{2:064x}"]


def test_the_judgement_of_a_run_that_was_stopped_is_its_last_models(tmp_path: Path):
    async def together() -> dict[str, Any]:
        def watch(event: Mapping[str, Any]) -> None:
            if event["what"] == "round" and event["round"] == 2:
                server.stop()

        server = Server(plan(plan={"rounds": 9}), store=tmp_path / "store", port=0, watch=watch)
        nodes = [Node(server.url, data, name=name, directory=tmp_path / name) for name, data in clients().items()]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    store = SqlStore(tmp_path / "store")
    rounds = len(history["rounds"])
    assert history["outcome"] == "stopped"
    assert {row.round for row in store.evaluations(history["run"], places=("nodes",))} == set(range(rounds + 1))
    assert history["rounds"][-1]["nodes"]["accuracy"] > 0.8
    assert "Stopped" in Stored(tmp_path / "store").page(history["run"])


def test_a_run_without_rounds_and_one_with_a_single_point(tmp_path: Path):
    site = Stored(tmp_path)
    site.begin()
    assert "No model has been judged yet." in site.page()
    site.store.record_evaluation(EvaluationRow("r1", 0, "holdout", sums(0.7)))
    page = site.page()
    assert dots(page, "loss") == {"server&#39;s holdout": {0: 0.7}}
    assert "0.7 in round 0" in page
    assert "Not finished" in page


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.just(0.5), max_size=30))
@example([0.0, 5e-324])
@example([1e-310, 3e-310])
def test_every_number_has_a_place_in_the_picture(values: list[float]):
    drawn = chart("loss", {"a": list(enumerate(values)), "b": []})
    numbers = [(at, value) for at, value in enumerate(values) if math.isfinite(value) and abs(value) < 1e100]
    if drawn is None:
        assert not numbers
        return
    (line,) = drawn["lines"]
    assert [(at, value) for *_, at, value in line["dots"]] == numbers
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y, *_ in line["dots"])
    assert len(drawn["odd"]) == len(values) - len(numbers)
    assert len(re.findall("[ML]", line["path"])) == len(numbers)
    for axis, most in ((drawn["across"], 8), (drawn["up"], 8)):
        places, labels = zip(*axis, strict=True)
        assert 1 <= len(axis) <= most
        assert len(set(labels)) == len(labels), labels
        assert len(set(places)) == len(places)


def test_a_long_run_is_thinned_paged_and_quick(tmp_path: Path):
    site, count = Stored(tmp_path), 10_000
    site.begin(rounds=count)
    with site.store._base.begin() as base:
        evaluations = [
            EvaluationRow("r1", k, place, sums(1 + abs(k - 7777))) for k in range(count + 1) for place in ("holdout", "nodes")
        ]
        base.execute(insert(sql._EVALUATIONS), [asdict(row) for row in evaluations])
        base.execute(insert(sql._ROUNDS), [asdict(closed(k, [])[0]) for k in range(1, count + 1)])
    pages = Pages(site)

    def page(number: int = 1) -> tuple[float, str]:
        began = time.perf_counter()
        text = pages.render("r1", view.Which(rounds=number), None)
        return time.perf_counter() - began, text

    page()
    took, first = min(page() for _ in range(5))
    assert took < 0.1
    assert len(first.encode()) < 200_000
    shown = dots(first, "loss")["server&#39;s holdout"]
    assert POINTS / 2 <= len(shown) <= POINTS + 2
    assert (min(shown), max(shown)) == (0, count)
    assert all(loss == 1 + abs(round_ - 7777) for round_, loss in shown.items())
    assert re.findall(r'id="model-best" href="/v1/models/(\w+)"', first) == [f"{7777:064x}"]
    assert re.findall(r"<tr><td>(\d+)</td>", first) == [str(count - k) for k in range(view.ROWS)]
    _, second = page(2)
    assert re.findall(r"<tr><td>(\d+)</td>", second)[0] == str(count - view.ROWS)
    assert 'href="?rounds=1"' in second
    assert 'href="?rounds=3"' in second
    began = time.perf_counter()
    assert len(site.store.history("r1")["rounds"]) == count
    assert time.perf_counter() - began < 5, "the page links to the run as JSON"
    _, beyond = page(999_999)
    assert "<h2" in beyond


def test_what_was_read_once_is_followed():
    """A page of a run that grows shows what a new reader shows, whenever it was looked at."""
    site = Stored(MEMORY)
    site.begin(rounds=150)
    pages = Pages(site)
    for number in range(1, 151):
        site.store.close_round(*closed(number, [EvaluationRow("r1", number - 1, "nodes", sums(5.0 + number % 7))]))
        site.store.record_update(UpdateRow("r1", number, 1, "n2", "declined", reason="no"))
        if number % 30 in (0, 1) or number < 4:
            assert pages.render("r1", view.Which(), None) == Pages(site).render("r1", view.Which(), None), number
    row = site.store.get("r1")
    assert row
    tally = pages.past(row).tally
    assert (tally.rounds, tally.bytes, tally.updates) == (150, 12_000, {"accepted": 150, "declined": 150})


def test_many_viewers_cost_what_one_does_and_many_nodes_are_counted(tmp_path: Path):
    count = 10_000
    state, _ = machine.begin("r1", plan(), "0" * 64, 0.0)
    state, _ = machine.transition(state, events.Joined(0.0, {f"{k:032x}": f"node-{k}" for k in range(count)}))
    state, _ = machine.transition(state, events.Lost(1.0, f"{7777:032x}"))
    asked: list[float] = []

    class Busy(Stored):
        def status(self) -> dict[str, Any]:
            began = time.perf_counter()
            found = {"plan": "heart", **status(state, 1.0, 1000.0, {}, {}, {}, log=None, store=None)}
            asked.append(time.perf_counter() - began)
            return found

    site = Busy(tmp_path, {"is": "live"})
    site.begin()
    pages = Pages(site)

    async def look() -> list[str | None]:
        return await asyncio.gather(*(pages.page("r1", view.Which()) for _ in range(100)))

    page, *same = asyncio.run(look())
    assert page
    assert set(same) == {page}
    assert len(asked) == 1
    assert asked[0] < 0.5
    assert "1 lost · 9999 training" in page
    assert page.count('<li class="') == view.NODES
    assert page.index("node-7777</b>") < page.index("node-0</b>")
    assert f"and {count - view.NODES} more" in page


def test_many_runs_are_paged(tmp_path: Path):
    site = Stored(tmp_path)
    for number in range(view.ROWS + 1):
        site.begin(f"r{number}", started=float(number))
    page = site.page("r0")
    assert page.count('href="/runs/') == view.ROWS
    assert 'href="?runs=2"' in page
    assert '<b aria-current="page">r0</b>' in site.page("r0", runs=2)


def test_metrics_are_what_prometheus_reads(tmp_path: Path):
    site = Stored(tmp_path, machine_status(log_waiting="the broker is away"))
    site.begin()
    site.store.record_update(UpdateRow("r1", 1, 1, "n1", "declined", reason=HOSTILE))
    site.store.close_round(*closed(1, [EvaluationRow("r1", 1, "holdout", sums(math.nan, 9.0))]))
    site.store.close_round(*closed(2, [EvaluationRow("r1", 1, "nodes", sums(0.5))]))
    site.store.record_evaluation(EvaluationRow("r1", 2, "nodes", {**sums(0.5), 'metric.a"b\\': 5.0}))
    text = asyncio.run(Pages(site).metrics())
    families = {one.name: one for one in text_string_to_metric_families(text)}
    assert all(one.documentation and one.type != "unknown" for one in families.values())
    assert all(name.startswith("atoll_") or name == "process_resident_memory_bytes" for name in families)
    found = {(one.name, *one.labels.values()): one.value for family in families.values() for one in family.samples}
    assert math.isnan(found.pop(("atoll_loss", "holdout")))
    assert found.pop(("process_resident_memory_bytes",)) > 1e7
    assert found == {
        ("atoll_run_info", "r1"): 1, ("atoll_rounds_planned",): 3, ("atoll_round",): 1, ("atoll_attempt",): 1,
        ("atoll_rounds_total",): 2, ("atoll_round_seconds_count",): 2, ("atoll_round_seconds_sum",): 1.0,
        ("atoll_received_bytes_total",): 160, ("atoll_updates_total", "accepted"): 2, ("atoll_updates_total", "declined"): 1,
        ("atoll_updates_total", "rejected"): 0, ("atoll_updates_total", "late"): 0, ("atoll_nodes",): 2,
        ("atoll_nodes_connected",): 2, ("atoll_nodes_waited_for",): 1, ("atoll_nodes_held_out",): 0, ("atoll_log_waiting",): 1,
            ("atoll_store_waiting",): 0,
        ("atoll_loss", "nodes"): 0.5, ("atoll_accuracy", "holdout"): 0.9, ("atoll_accuracy", "nodes"): 0.5,
        ("atoll_figure", 'a"b\\', "nodes"): 0.5,
    }  # fmt: skip
    assert "script" not in text


@pytest.mark.parametrize("said", ["0", "-1", "x", "²", "99999999", ""])
def test_a_page_number_that_is_none_is_the_first(said: str):
    from atoll.server.page import _number

    assert _number(said) == 1
