"""What a data's owner agrees to: read strictly, and kept to on the node whatever the server says."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from tests.federation import clients, plan, rows

from atoll import learners
from atoll.errors import AtollError, GaveUpError, PolicyError
from atoll.keys import Identity
from atoll.messages import StartTraining
from atoll.node.gate import TRIES, Gate
from atoll.node.policy import Asked, Policy, refuses
from atoll.node.runtime import Node
from atoll.preprocess import prepare
from atoll.server.runtime import Server
from atoll.store.ledger import Ledger
from atoll.wire import Address, seal

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()  # a Wednesday
ROUND = Asked(round=1, rows=40, judged=40, left=0)
TABLE = {"features": ["age", "dose", "sex", "cp"], "target": "ill"}


def table(**data):
    return plan(model={"inputs": None}, data={**TABLE, **data})


def refused(policy, agreed, asked=ROUND, now=NOON):
    return refuses(Policy.of(policy), agreed, asked, now)


def test_a_policy_that_says_nothing_agrees_to_everything():
    assert refused({}, plan()) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("minimum_cohrt = 3", "policy.toml: minimum_cohrt: unknown key; did you mean 'minimum_cohort'?"),
        ("Minimum_cohort = 3", "policy.toml: Minimum_cohort: unknown key; did you mean 'minimum_cohort'?"),
        ("minimum_cohort = 0", "policy.toml: minimum_cohort: Input should be greater than 0 (it is 0)"),
        ("minimum_cohort = '3'", "policy.toml: minimum_cohort: Input should be a valid integer (it is '3')"),
        ("plans = ['eef4']", 'policy.toml: plans: is "any", "ask", or a list of whole digests (64 hex digits'),
        ("plans = 'Ask'", 'policy.toml: plans: is "any", "ask", or a list of whole digests'),
        ("guards = []", "policy.toml: guards: Tuple should have at least 1 item"),
        ("guards = ['secagg']", "policy.toml: guards.0: Input should be 'secure_aggregation' or 'encryption'"),
        ("hours = '22-6'", "policy.toml: hours: looks like \"22:00-06:00\" (it is '22-6')"),
        ("hours = '06:00-06:00'", "policy.toml: hours: begins and ends at the same time"),
        ("hours = '22:00-06:00'\ntime_zone = 'Europe/Bern'", "policy.toml: time_zone: no time zone that this machine knows"),
        ("time_zone = 'Europe/Berlin'", "policy.toml: policy: time_zone goes with hours or weekdays"),
        ("weekdays = ['monday']", "policy.toml: weekdays.0: Input should be 'mon'"),
        ("epsilon = 8.0", "policy.toml: policy: epsilon, epsilon_round and delta go with noise"),
        ("noise = ['local']", "policy.toml: noise: 'local' is no kind of noise; did you mean 'local_noise'?"),
        ("header = ['age']", "policy.toml: policy: header goes with columns"),
        ("roster = ['a', 'b', 'c']", "policy.toml: roster: 'a' is no node's id"),
        ("day = 2026-11-25", "policy.toml: Object of type date is not JSON serializable"),
        ("minimum_cohort 3", "policy.toml: no TOML"),
    ],
)
def test_a_mistake_in_a_policy_is_one_line(tmp_path, text, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(PolicyError) as caught:
        Policy.load("policy.toml")
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_policy_that_is_not_there():
    with pytest.raises(PolicyError, match=r"nowhere.toml: can't be read \(No such file or directory\); `atoll policy new"):
        Policy.load("nowhere.toml")


AGREED = plan()
LOCAL = plan(privacy={"clip": 1.0, "local_noise": {"multiplier": 5.0, "delta": 1e-5}})
IDS = ["0" * 32, "1" * 32, "2" * 32]


@pytest.mark.parametrize(
    ("policy", "agreed", "said"),
    [
        ({"plans": [AGREED.digest]}, AGREED, None),
        ({"plans": [AGREED.digest]}, plan(training={"epochs": 3}), "plans: plan"),
        ({"plans": []}, AGREED, "plans: plan"),
        ({"minimum_cohort": 3}, plan(cohort={"minimum": 3}), None),
        ({"minimum_cohort": 4}, plan(cohort={"minimum": 3}), "minimum_cohort: the plan adds up as few as 3 updates, it takes 4"),
        ({"minimum_cohort": 2}, plan(cohort={"minimum": 1, "cycle": 1}), "minimum_cohort: the plan adds up as few as 1"),
        (
            {"minimum_cohort": 4},
            plan(cohort={"minimum": 14}, privacy={"secure_aggregation": True, "buckets": 4}),
            "minimum_cohort: the plan adds up as few as 3",
        ),
        ({"guards": ["secure_aggregation"]}, AGREED, "guards: the plan's updates leave without secure_aggregation"),
        (
            {"guards": ["secure_aggregation", "encryption"]},
            AGREED,
            "guards: the plan's updates leave without secure_aggregation or",
        ),
        ({"roster": ["0" * 32, "1" * 32, "2" * 32]}, AGREED, "roster: the plan's updates leave one by one"),
        ({"guards": ["secure_aggregation"]}, plan(privacy={"secure_aggregation": True}), None),
        ({"guards": ["secure_aggregation"]}, plan(privacy={"encryption": True}), "guards: the plan's updates leave without"),
        ({"roster": IDS}, plan(privacy={"secure_aggregation": True}), None),
        ({"roster": IDS}, plan(privacy={"secure_aggregation": True, "roster": IDS}), None),
        (
            {"roster": IDS},
            plan(privacy={"secure_aggregation": True, "roster": [*IDS, "f" * 32]}),
            f"roster: the plan's has nodes that its owner doesn't know: {'f' * 32}",
        ),
        ({"noise": ["local_noise"]}, LOCAL, None),
        ({"noise": ["local_noise"]}, AGREED, "noise: the plan's updates leave without local_noise"),
        ({"noise": ["central_noise"]}, LOCAL, "noise: the plan's updates leave without central_noise"),
        ({"noise": ["local_noise"], "delta": 1e-6}, LOCAL, "delta: the plan's is 1e-05, at most 1e-06 is allowed"),
        ({"noise": ["local_noise"], "epsilon": 9}, LOCAL, "epsilon: nothing bounds it with this round's update, at most 9 is"),
        ({"columns": ["age", "dose", "sex", "cp", "ill"]}, table(), None),
        ({"columns": ["age", "dose", "sex", "cp"]}, table(), "columns: the plan reads ill; allowed: age, dose, sex, cp"),
        ({"columns": ["age", "dose", "sex", "cp", "ill"]}, table(split="part"), "columns: the plan reads part"),
        ({"columns": ["Age", "dose", "sex", "cp", "ill"]}, table(), "columns: the plan reads age"),
        ({"columns": ["age"]}, AGREED, "columns: the plan names none"),
        (
            {"columns": ["age", "dose", "sex", "cp", "ill"]},
            table(columns=["cp", "dose", "sex", "age", "ill", "name"]),
            "header: the plan gives files' columns names of its own (cp, dose",
        ),
        (
            {"columns": ["age", "dose", "sex", "cp", "ill"], "header": ["age", "dose", "sex", "cp", "ill"]},
            table(columns=["age", "dose", "sex", "cp", "ill"]),
            None,
        ),
        ({"functions": []}, AGREED, None),
        (
            {"functions": ["ours:brier"]},
            plan(model={"metrics": ["ours:brier", "ours:rows"]}),
            "functions: the plan runs ours:rows",
        ),
        ({"epochs": 2}, AGREED, None),
        ({"epochs": 1}, AGREED, "epochs: the plan goes over these rows 2 times a round, 1 are allowed"),
        ({"epochs": 2}, plan(training={"epochs": None, "steps": 10}), None),
        ({"epochs": 2}, plan(training={"epochs": None, "steps": 11}), "epochs: the plan goes over these rows 2.2 times"),
    ],
)
def test_what_a_policy_refuses(policy, agreed, said):
    found = refused(policy, agreed)
    assert (found is None) == (said is None)
    assert (found or "").startswith(said or "")


@pytest.mark.parametrize(
    ("policy", "trick", "said"),
    [
        ({"minimum_cohort": 3}, {"cohort": {"draw": "poisson"}}, "minimum_cohort: the plan draws each node by chance"),
        ({"rows": 20}, {"training": {"epochs": None, "steps": 1, "batch_size": 1}}, "rows: fewer than 20 would be in the update"),
        ({"brokers": []}, {"log": {"kafka": "elsewhere:9092"}}, "brokers: the plan sends updates to the Kafka at elsewhere:9092"),
        (
            {"brokers": ["hub:9092"]},
            {"log": {"kafka": "hub:9092,elsewhere:9092"}},
            "brokers: the plan sends updates to the Kafka at e",
        ),
        ({"epochs": 2}, {"aggregation": {"rule": "mime_lite"}}, "epochs: the plan goes over these rows 3 times"),
        ({"epochs": 2}, {"aggregation": {"rule": "ditto"}}, "epochs: the plan goes over these rows 4 times"),
        (
            {"epochs": 2},
            {"aggregation": {"rule": "finetune", "options": {"steps": 1000}}},
            "epochs: the plan goes over these rows 202",
        ),
        (
            {"epochs": 2},
            {"aggregation": {"rule": "scaffold", "options": {"option": "I"}}},
            "epochs: the plan goes over these rows 3",
        ),
        (
            {"epochs": 2},
            {"model": {"logistic": False, "sklearn": "LogisticRegression"}, "training": {"epochs": None, "steps": 3}},
            "epochs: the plan goes over these rows 3 times",
        ),
    ],
)
def test_tricks_of_a_plans_author(policy, trick, said):
    assert (refused(policy, plan(**trick)) or "").startswith(said)


def test_a_plan_that_picks_out_one_person_by_missing_or_split_is_refused(tmp_path):
    """Rows with a word of `missing` are left out, and `split` says which rows judge: both can leave a single one."""
    lines = [f"{30 + k},{k % 7},{k % 2},{k % 3},{k % 2},{'test' if k == 7 else 'train'}" for k in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["age,dose,sex,cp,ill,part", *lines]))
    alone = table(missing=[str(30 + k) for k in range(40) if k != 7])
    judged = table(split="part")
    for agreed in (alone, judged):
        found = prepare(tmp_path / "rows.csv", agreed)
        assert min(len(found.train), len(found.judge)) == 1
        gate = Gate(Policy.of({"rows": 20}), Ledger(tmp_path))
        assert gate.meets(agreed) is None
        gate.rows, gate.judged = len(found.train), len(found.judge)
        task = StartTraining(run="r", round=1, attempt=1, model="0" * 64, deadline=9.0)
        with pytest.raises(PolicyError, match=r"rows: fewer than \d+ would be in the update or its figures"):
            gate.check(task)
        assert gate.tells({"loss": 1.0}) == {}


@pytest.mark.parametrize("number", [0, 4, 1 << 62])
def test_a_round_that_the_plan_has_not_is_refused_without_any_policy(number):
    assert refused({}, plan(), Asked(number, 40, 40, 0)) == f"the plan has rounds 1 to 3, and none with number {number}"


def test_updates_are_counted_over_all_plans_and_runs():
    assert refused({"updates": 5}, plan(), Asked(1, 40, 40, 4)) is None
    assert refused({"updates": 5}, plan(), Asked(1, 40, 40, 5)) == "updates: 5 left this node already, 5 may"


def test_epsilon_of_a_round_and_of_all_that_ever_left():
    policy = {"noise": ["local_noise"], "epsilon": 2.0, "epsilon_round": 1.0}
    assert refused(policy, LOCAL, Asked(1, 40, 40, 0, epsilon=2.0, epsilon_round=1.0)) is None
    over = refused(policy, LOCAL, Asked(1, 40, 40, 0, epsilon=2.01, epsilon_round=1.0))
    assert over == "epsilon: it comes to 2.01 with this round's update, at most 2 is allowed"
    assert (refused(policy, LOCAL, Asked(1, 40, 40, 0, epsilon=1.5, epsilon_round=1.5)) or "").startswith(
        "epsilon_round: it comes to 1.5"
    )


@pytest.mark.parametrize(
    ("policy", "when", "said"),
    [
        ({"hours": "22:00-06:00"}, "2026-11-25 23:59", None),
        ({"hours": "22:00-06:00"}, "2026-11-26 05:59", None),
        ({"hours": "22:00-06:00"}, "2026-11-26 06:00", "hours: it is 06:00, and this node works 22:00-06:00"),
        ({"hours": "22:00-06:00"}, "2026-11-26 21:59", "hours: it is 21:59"),
        ({"hours": "08:00-18:00"}, "2026-11-26 08:00", None),
        ({"hours": "08:00-18:00"}, "2026-11-26 18:00", "hours: it is 18:00"),
        ({"weekdays": ["sat", "sun"]}, "2026-11-28 00:00", None),
        ({"weekdays": ["sat", "sun"]}, "2026-11-30 00:00", "weekdays: it is mon, and this node works on sat, sun"),
        ({"hours": "22:00-06:00", "weekdays": ["fri"]}, "2026-11-28 05:00", None),  # friday's night
        ({"hours": "22:00-06:00", "weekdays": ["sat"]}, "2026-11-28 05:00", "weekdays: it is fri"),
        ({"hours": "01:30-03:30"}, "2026-10-25 02:30", None),  # the hour that comes twice
    ],
)
def test_hours_and_weekdays_in_the_owners_time_zone(policy, when, said):
    now = datetime.fromisoformat(when).replace(tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
    found = refused({**policy, "time_zone": "Europe/Berlin"}, plan(), now=now)
    assert (found is None) == (said is None)
    assert (found or "").startswith(said or "")


def together(agreed, place, policies):
    """Run a federation in which the last node has a policy and is there first: the history, how each node ended, all events."""
    told = {name: [] for name in policies}
    seen = []

    async def all_of_them():
        here = asyncio.Event()
        server = Server(agreed, store=place / "store", port=0, watch=seen.append)

        def watch(event):
            told[last].append(event)
            if event["what"] == "connected":
                here.set()

        async def start(name, rows):
            if name != last:
                await here.wait()
            node = Node(
                server.url, rows, name=name, directory=place / name, policy=policies[name], watch=watch if name == last else None
            )
            return await node.start_async()

        *_, last = policies
        starting = (start(name, rows) for name, rows in clients(len(policies)).items())
        return await asyncio.gather(server.serve_async(), *starting, return_exceptions=True)

    history, *ends = asyncio.run(asyncio.wait_for(all_of_them(), 60))
    return history, dict(zip(policies, ends, strict=True)), told, seen


def test_a_plan_that_is_refused_is_told_to_both_sides_and_the_run_goes_on_without_that_node(tmp_path):
    (tmp_path / "policy.toml").write_text("minimum_cohort = 5")
    policies = {"node-0": None, "node-1": None, "node-2": tmp_path / "policy.toml"}
    history, ends, told, seen = together(plan(cohort={"minimum": 2}), tmp_path, policies)
    why = f"{tmp_path}/policy.toml: minimum_cohort: the plan adds up as few as 2 updates, it takes 5"
    assert history["outcome"] == "completed"
    assert not any("node-2" in row["answered"] for row in history["rounds"])
    assert isinstance(ends["node-2"], PolicyError)
    assert str(ends["node-2"]) == why
    assert [event for event in told["node-2"] if event["what"] == "refused"] == [{"what": "refused", "reason": why}]
    assert {event["reason"] for event in seen if event["what"] == "declined"} == {why}
    assert not any(event["what"] in ("ready", "trained", "sent") for event in told["node-2"])


def test_a_round_that_is_refused_is_declined_and_the_node_stays(tmp_path):
    policies = {"node-0": None, "node-1": None, "node-2": Policy.of({"updates": 1})}
    history, ends, told, seen = together(plan(cohort={"minimum": 2}), tmp_path, policies)
    assert history["outcome"] == "completed"
    assert ["node-2" in row["answered"] for row in history["rounds"]] == [True, False, False]
    why = "the owner's policy: updates: 1 left this node already, 1 may"
    assert [event["reason"] for event in told["node-2"] if event["what"] == "declined"] == [why, why]
    assert [event["reason"] for event in seen if event["what"] == "declined"] == [why, why]
    assert ends["node-2"].outcome == "completed"


def test_a_policys_file_is_read_again_before_a_task_where_it_changed(tmp_path):
    """After the first round the owner spoils the file; what is written then in its place holds from the next try on."""
    file, told, seen = tmp_path / "policy.toml", [], []
    file.write_text("updates = 5")
    agreed = plan(cohort={"minimum": 3, "quorum": 1.0})

    def watch(event):
        told.append(event)
        if event["what"] == "verdict":
            file.write_text("updates = ")
        if event["what"] == "declined":
            file.write_text("updates = 1")

    async def all_of_them():
        server = Server(agreed, store=tmp_path / "store", port=0, watch=seen.append)
        nodes = [Node(server.url, one, name=name, directory=tmp_path / name) for name, one in clients().items()]
        nodes[2] = Node(server.url, rows(2), name="node-2", directory=tmp_path / "node-2", policy=file, watch=watch)
        return await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes), return_exceptions=True)

    served, *_ = asyncio.run(asyncio.wait_for(all_of_them(), 60))
    declined = [event["reason"] for event in told if event["what"] == "declined"]
    assert declined[0].startswith(f"{file}: no TOML")
    assert declined[1:] == [f"{file}: updates: 1 left this node already, 1 may"] * 2
    assert [event["reason"] for event in seen if event["what"] == "declined"] == declined, "the server reads the same"
    assert isinstance(served, GaveUpError)


def test_a_plan_that_the_changed_policy_refuses_ends_the_node(tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text("minimum_cohort = 2\n")
    ledger = Ledger(tmp_path)
    gate, task = Gate(file, ledger), StartTraining(run="r", round=1, attempt=1, model="0" * 64, deadline=9.0)
    assert gate.meets(plan()) is None
    gate.check(task)
    file.write_text("minimum_cohort = 20\n")
    with pytest.raises(PolicyError, match="minimum_cohort: the plan adds up as few as 3"):
        gate.check(task)
    assert gate.shut
    file.unlink()
    with pytest.raises(PolicyError, match="can't be read"):
        gate.check(task)
    ledger.close()


def test_a_node_that_was_refused_at_the_door_says_so_when_its_policy_changes(tmp_path):
    """Nothing was read or built for the plan, so there is nothing to train with either: its owner starts it again."""
    file, told = tmp_path / "policy.toml", []
    file.write_text("minimum_cohort = 20")
    agreed = plan(plan={"rounds": 1}, cohort={"minimum": 3, "quorum": 0.7})

    def watch(event):
        told.append(event)
        if event["what"] == "refused":
            file.write_text("minimum_cohort = 3")

    async def all_of_them():
        server = Server(agreed, store=tmp_path / "store", port=0)
        late = Node(server.url, rows(3), name="node-3", directory=tmp_path / "node-3", policy=file, watch=watch)
        nodes = [Node(server.url, one, name=name, directory=tmp_path / name) for name, one in clients().items()]
        return await asyncio.gather(
            late.start_async(), server.serve_async(), *(node.start_async() for node in nodes), return_exceptions=True
        )

    ended, history, *_ = asyncio.run(asyncio.wait_for(all_of_them(), 60))
    assert isinstance(ended, PolicyError)
    assert str(ended) == f"{file}: the plan was refused as it stood before; by now it isn't: start the node again"
    assert [event["reason"] for event in told if event["what"] == "declined"] == [str(ended)]
    assert history["outcome"] == "completed"


def leaves(ledger, round_, attempt):
    identity = Identity.of("whoever")
    envelope = seal(identity, Address("r", round_, attempt, identity.node), plan().digest, [b"%d %d" % (round_, attempt)])
    ledger.leaving(envelope, 0.0)
    return envelope.digest


def test_a_round_is_tried_so_often_at_most_without_any_policy(tmp_path):
    ledger = Ledger(tmp_path)
    gate = Gate(None, ledger)
    gate.meets(plan())
    for attempt in range(1, TRIES + 1):
        gate.check(StartTraining(run="r", round=1, attempt=attempt, model="0" * 64, deadline=9.0))
        leaves(ledger, 1, attempt)
    gate.check(StartTraining(run="r", round=1, attempt=TRIES, model="0" * 64, deadline=9.0))  # what left is sent once more
    with pytest.raises(PolicyError, match=f"{TRIES} updates of round 1 left already, each for another try; a node makes no more"):
        gate.check(StartTraining(run="r", round=1, attempt=TRIES + 1, model="0" * 64, deadline=9.0))
    gate.check(StartTraining(run="r", round=2, attempt=1, model="0" * 64, deadline=9.0))
    ledger.close()


def test_a_ledger_that_was_put_back_is_found_by_what_the_server_counts(tmp_path):
    ledger, other = Ledger(tmp_path / "before"), Ledger(tmp_path / "after")
    first = leaves(ledger, 1, 1)
    second = leaves(other, 2, 1)
    gate = Gate(None, ledger)
    gate.meets(plan())
    gate.check(StartTraining(run="r", round=2, attempt=1, model="0" * 64, deadline=9.0, counted=first))
    with pytest.raises(PolicyError, match=f"the server counts update {second[:12]} of this node, which its ledger lacks"):
        gate.check(StartTraining(run="r", round=3, attempt=1, model="0" * 64, deadline=9.0, counted=second))
    ledger.close()
    other.close()


def test_a_node_that_asks_its_owner_and_finds_nobody_says_what_to_write(tmp_path):
    policies = {"node-0": None, "node-1": None, "node-2": Policy.of({"plans": "ask"})}
    agreed = plan(cohort={"minimum": 2})
    _, ends, _, _ = together(agreed, tmp_path, policies)
    assert isinstance(ends["node-2"], AtollError)
    assert f'plans = ["{agreed.digest}"]' in str(ends["node-2"])


def test_the_owners_budget_ends_a_node_and_not_the_run_whatever_the_plan_allows(tmp_path):
    """One release of this noise costs ε 0.72, three cost 1.33 and six 1.98: the owner's second run is cut off in its middle."""
    mine = Policy.of({"noise": ["local_noise"], "epsilon": 1.75})
    policies = {"node-0": None, "node-1": None, "node-2": mine}
    agreed = LOCAL.with_(cohort={"minimum": 2})
    first, *_ = together(agreed, tmp_path, policies)
    second, _, told, _ = together(agreed, tmp_path, policies)
    assert first["outcome"] == second["outcome"] == "completed"
    declined = [event["reason"] for event in told["node-2"] if event["what"] == "declined"]
    assert declined
    assert all("epsilon: it comes to" in why for why in declined)
    ledger = Ledger(tmp_path / "node-2")
    spent = [entry["epsilon"] for entry in ledger.entries()]
    ledger.close()
    assert 3 < len(spent) < 6
    assert spent == sorted(spent)
    assert spent[-1] <= 1.75


def test_a_policys_roster_keeps_strangers_out_of_a_secure_sum(tmp_path):
    """The plan names no roster and the server lets everybody in: the node that knows two of the three others declines."""
    known = [Identity.at(tmp_path / name / "node.key").node for name in ("node-0", "node-1", "node-3")]
    stranger = Identity.at(tmp_path / "node-2" / "node.key").node
    policies = {**dict.fromkeys(("node-0", "node-1", "node-2")), "node-3": Policy.of({"roster": known})}
    agreed = plan(privacy={"secure_aggregation": True}, plan={"rounds": 1}, cohort={"minimum": 4})
    end, _, told, _ = together(agreed, tmp_path, policies)
    declined = [event["reason"] for event in told["node-3"] if event["what"] == "declined"]
    assert declined
    assert all(f"node {stranger} is not in the roster" in why for why in declined)
    assert isinstance(end, GaveUpError)


class Talkative:
    """A learner whose errors hold what only rows can tell."""

    def __init__(self, learner):
        self._learner = learner

    def __getattr__(self, name):
        return getattr(self._learner, name)

    def fit(self, *_, **__):
        raise ValueError("patient 4711 is 97 years old")


def test_words_of_a_frameworks_error_stay_on_the_node(tmp_path):
    agreed, seen = plan(cohort={"minimum": 2}), []

    async def all_of_them():
        server = Server(agreed, store=tmp_path / "store", port=0, watch=seen.append)
        own = [None, None, Talkative(learners.build(agreed))]
        nodes = [
            Node(server.url, rows, name=name, directory=tmp_path / name, learner=learner)
            for (name, rows), learner in zip(clients().items(), own, strict=True)
        ]
        await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))

    asyncio.run(asyncio.wait_for(all_of_them(), 60))
    reasons = {event["reason"] for event in seen if event["what"] == "declined"}
    assert reasons <= {"training failed (ValueError); the node's own log says more"}
    assert "4711" not in str(seen)
