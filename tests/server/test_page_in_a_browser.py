"""The status page as a person meets it: in a real browser, over a real server, with real processes that die."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from tests.browser import Browser, Tab
from tests.federation import atoll, events, plan, rows
from tests.server.test_page import HOSTILE, Stored, closed, machine_status, sums

from atoll.server import http, page, web
from atoll.server.viewing import Viewing
from atoll.store import EvaluationRow, NodeRow, UpdateRow
from atoll.store.models import Models
from atoll.store.viewers import Viewers

LONG = "x" * 300


class Site(Stored):
    """A site with models, that a browser can reach."""

    def __init__(self, place: Path, present: dict[str, Any] | None = None) -> None:
        super().__init__(place, present)
        self.models, self.plan = Models(place / "models"), plan()
        self.book = SimpleNamespace(fetched=lambda size: None)

    @contextlib.contextmanager
    def served(self, behind: Callable[[Any], Any] = lambda app: app) -> Iterator[str]:
        listener = web.bind("127.0.0.1", 0)
        server = web.Web(behind(Starlette(routes=[*http.routes(self), *page.routes(self)])))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def crowded(place: Path) -> Site:
    """A site whose run has everything that can be long, wide or hostile."""
    present = machine_status()
    present["nodes"] += [{**present["nodes"][0], "name": name, "reason": LONG} for name in (HOSTILE, LONG, "lost-one")]
    present["nodes"][-1] |= {"doing": "lost", "since": 5.0, "waited_for": True}
    site = Site(place, present)
    site.begin(rounds=10**6)
    site.store.saw_node(NodeRow("r1", "n1", LONG, "k", 1.0, 1.0))
    for number in range(1, 31):
        row, updates, _ = closed(number, [])
        judged = [EvaluationRow("r1", number, "holdout", sums(1e5 / number)), EvaluationRow("r1", number - 1, "nodes", sums(2.5))]
        site.store.close_round(row, updates, judged)
        site.store.record_update(UpdateRow("r1", number, 1, "n1", "declined", reason=HOSTILE + LONG))
    for number in range(30):
        site.begin(f"{number}{LONG}", started=float(number))
    return site


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    with browser.tab() as opened:
        opened.look(1280, 900)
        yield opened


def test_a_viewer_signs_in_by_the_form_and_no_address_holds_the_token(tab: Tab, tmp_path: Path):
    with contextlib.closing(Viewers(tmp_path)) as viewers:
        token = viewers.add("ward")
        with crowded(tmp_path).served(lambda app: Viewing(app, viewers)) as url:
            tab.open(f"{url}/runs/r1")
            for shown in ("wrong", token):
                tab.wait("document.querySelector('form')")
                tab.run(f"document.querySelector('input').value = '{shown}'")
                tab.run("document.querySelector('form').dataset.old = 1, document.querySelector('button').click()")
                while tab.run("document.readyState !== 'complete' || document.querySelector('form[data-old]') !== null"):
                    pass  # asked anew each time: a promise would go with its page
            tab.wait("document.querySelector('table')")
            assert tab.run("location.href") == f"{url}/runs/r1"
            assert tab.run("document.cookie") == "", "no script sees it"


def test_a_run_is_followed_a_killed_node_is_seen_and_a_server_that_is_gone_is_told(tab: Tab, tmp_path: Path):
    agreed = plan(plan={"rounds": 10**6}, cohort={"minimum": 2, "quorum": 1.0, "deadline": 60})
    (tmp_path / "plan.json").write_text(agreed.to_json())
    for seed in (0, 1, 3):
        x, y = rows(seed)
        np.savetxt(tmp_path / f"{seed}.csv", np.column_stack([x, y]), delimiter=",", header="a,b,c,d,y", comments="")
    agreed = agreed.with_(data={"features": ["a", "b", "c", "d"], "target": "y"})
    (tmp_path / "plan.json").write_text(agreed.to_json())
    with contextlib.ExitStack() as stack:
        words = ["serve", tmp_path / "plan.json", "--holdout", tmp_path / "3.csv", "--store", tmp_path / "store"]
        server = stack.enter_context(atoll(*words, "--port", "0", "--json", log=tmp_path / "server.log"))
        url = next(event["url"] for event in events(server) if event["what"] == "listening")
        tab.open(url)
        assert tab.run("document.body.innerText.includes('No node has joined yet.')")
        nodes = []
        for k in range(2):
            join = ["join", url, "--data", tmp_path / f"{k}.csv", "--name", f"bank-{k}", "--dir", tmp_path / f"{k}", "--json"]
            nodes.append(stack.enter_context(atoll(*join, log=tmp_path / f"{k}.log")))
        heard = threading.Thread(target=lambda: [None for _ in events(server)], daemon=True)
        heard.start()
        # The page was opened before there was anything to see, and is never loaded again.
        tab.run("window.same = true")
        tab.wait("document.querySelectorAll('[data-figure=loss] circle').length > 4", 30)
        nodes[1].send_signal(signal.SIGSTOP)  # so that the round is surely one that waits for it, for two seconds by now
        tab.wait("/waiting for bank-1; 5[0-8] s left/.test(document.body.innerText)")
        assert tab.run("document.querySelectorAll('.lost').length") == 0
        nodes[1].kill()
        took = tab.wait("/bank-1 lost since [0-9:]+ · waited for/.test(document.body.innerText)", 5)
        assert took < 2
        assert tab.run("document.querySelectorAll('.lost').length") == 1
        assert tab.run("document.querySelector('#headline').innerText").endswith(": training")
        assert tab.run("window.same")
        assert not tab.errors
        server.kill()
        tab.wait("!away.hidden && /can't be reached.* last seen at [0-9:]+/.test(away.innerText)", 5)
        assert tab.run("document.querySelectorAll('[data-figure=loss] circle').length > 4")
        heard.join()


def test_the_curve_is_drawn_where_its_values_say(tab: Tab, tmp_path: Path):
    site = Site(tmp_path)
    site.begin(rounds=12)
    losses = {number: 2.0 / number for number in range(1, 13)}
    for number, loss in losses.items():
        site.store.close_round(*closed(number, [EvaluationRow("r1", number, "holdout", sums(loss, number / 2))]))
    with site.served() as url:
        tab.open(f"{url}/runs/r1")
        drawn = tab.run("""[...document.querySelectorAll('[data-figure=loss] circle')].map(dot => {
            const box = dot.getBoundingClientRect();
            return [+dot.dataset.round, +dot.dataset.value, box.x + box.width / 2, box.y + box.height / 2]; })""")
        assert {round_: value for round_, value, *_ in drawn} == pytest.approx(losses, rel=1e-12)
        box = "document.querySelector('[data-figure=loss]').getBoundingClientRect()"
        picture = tab.run(f"(({{x, y, width, height}}) => [x, y, width, height])({box})")
        x, y = np.array([place for *_, place, _ in drawn]), np.array([place for *_, place in drawn])
        assert picture[0] < x.min() < x.max() < picture[0] + picture[2]
        assert picture[1] < y.min() < y.max() < picture[1] + picture[3]
        # Places are a straight function of values: x of the round, y of the loss, downwards.
        for places, values, sign in ((x, list(losses), 1), (y, list(losses.values()), -1)):
            slope, start = np.polyfit(values, places, 1)
            assert slope * sign > 0
            np.testing.assert_allclose(places, slope * np.array(values) + start, atol=0.3)
        assert tab.run("document.querySelector('[data-figure=accuracy] path').getAttribute('d').match(/[ML]/g).length") == 12
        assert tab.run("document.querySelector('[data-figure=loss]').tagName") == "svg"
        assert not tab.errors


def test_the_link_gives_the_model_whole_under_a_name_of_its_own(browser: Browser, tab: Tab, tmp_path: Path):
    from atoll import learners

    site = Site(tmp_path)
    site.begin()
    digest = site.models.put(learners.build(plan()).initial(1))
    row, updates, _ = closed(1, [])
    site.store.close_round(type(row)(**{**vars(row), "model": digest}), updates, [EvaluationRow("r1", 1, "holdout", sums(1.0))])
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    with site.served() as url:
        tab.open(f"{url}/runs/r1")
        tab.run("document.getElementById('model-best').click()")
        tab.wait("document.readyState === 'complete'")
        done = browser.heard("Browser.downloadProgress", state="completed")
    assert done["totalBytes"] > 0
    assert hashlib.sha256((tmp_path / "heart-round-1.safetensors").read_bytes()).hexdigest() == digest
    assert not tab.errors


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_sticks_out_and_all_can_be_read(tab: Tab, tmp_path: Path, scheme: str):
    site = crowded(tmp_path)
    with site.served() as url:
        for width in (320, 375, 1280):
            tab.look(width, 800, scheme=scheme, phone=width < 1000)
            tab.open(url)
            assert tab.run("innerWidth") == width
            assert tab.run("document.documentElement.scrollWidth") <= width
            out = tab.run("""[...document.querySelectorAll('body *')].filter(one => {
                const box = one.getBoundingClientRect();
                return box.width && (box.right > innerWidth + 1 || box.left < -1); }).map(one => one.outerHTML.slice(0, 200))""")
            assert not out
        assert tab.run("getComputedStyle(document.body).backgroundColor") == {
            "light": "rgb(246, 248, 248)", "dark": "rgb(12, 23, 27)",
        }[scheme]  # fmt: skip
        assert not tab.run(FAINT), "text needs a contrast of 4.5 to what lies behind it"
        assert not tab.errors


FAINT = """(() => {
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const behind = one => { for (; one; one = one.parentElement) {
    const found = parts(getComputedStyle(one).backgroundColor);
    if (found.length < 4 || found[3] === 1) return found; } return [255, 255, 255]; };
  const texts = [...document.querySelectorAll('body *')].filter(one => one.getClientRects().length
    && !one.closest('script, style, title, desc') && [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  if (texts.length < 50) return ['only ' + texts.length + ' texts were found'];
  return texts.map(one => {
    const style = getComputedStyle(one);
    const [a, b] = [light(parts(one.closest('svg') ? style.fill : style.color)), light(behind(one))].sort((p, q) => q - p);
    return [(a + .05) / (b + .05), one.outerHTML.slice(0, 120)];
  }).filter(([ratio]) => ratio < 4.5); })()"""


def test_its_structure_is_one_that_a_screen_reader_can_tell(tab: Tab, tmp_path: Path):
    with crowded(tmp_path).served() as url:
        tab.open(url)
        assert tab.run("document.documentElement.lang") == "en"
        headings = tab.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(one => one.tagName + ' ' + one.innerText)")
        assert headings == [
            "H1 heart",
            "H2 Nodes",
            "H2 Curves",
            "H2 How nodes differ",
            "H2 Models",
            "H2 Rounds",
            "H2 Runs in this store",
        ]
        found: dict[str, list[str]] = {}
        for node in tab.call("Accessibility.getFullAXTree")["nodes"]:
            if not node["ignored"]:
                found.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        for role in ("link", "image", "progressbar", "region", "navigation", "columnheader"):
            names = found.get(role) or found[{"image": "img"}.get(role, role)]
            assert names, role
            assert all(names), (role, names)
        assert len(set(found["link"])) == len(found["link"]), "each link says where it leads"
        assert tab.run(
            "new Set([...document.querySelectorAll('[id]')].map(one => one.id)).size == document.querySelectorAll('[id]').length"
        )
        assert "main" in found
        assert tab.run("document.scripts.length") == 1


def test_a_refresh_moves_neither_the_page_nor_the_focus(tab: Tab, tmp_path: Path):
    site = crowded(tmp_path)
    with site.served() as url:
        tab.look(375, 700, phone=True)
        tab.open(url)
        for _ in range(3):
            tab.press("Tab")
        assert tab.run("document.activeElement.id") == "model-last"
        assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        tab.run("document.getElementById('older-rounds').focus(); scrollBy(0, -100)")
        before = tab.run("[scrollY, document.querySelector('#nodes li').same = true][0]")
        site.store.close_round(*closed(31, [EvaluationRow("r1", 31, "holdout", sums(1.0))]))
        tab.wait("document.querySelector('.rounds td').innerText === '31'")
        assert tab.run("document.activeElement.id") == "older-rounds"
        assert tab.run("scrollY") == before
        assert tab.run("document.querySelector('#nodes li').same"), "what hasn't changed isn't touched"
        tab.press("Enter")
        tab.wait("location.search === '?rounds=2' && document.querySelector('.rounds td')?.innerText === '11'")
        site.store.close_round(*closed(32, []))
        tab.wait("document.querySelector('.rounds td').innerText === '12'")
        assert not tab.errors
