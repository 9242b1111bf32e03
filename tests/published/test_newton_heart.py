"""REFERENCES §2a: federated Newton–Raphson over four hospitals, equal to the last printed digit.

Published by NVIDIA FLARE (hello-lr, commit f3b7c1bffd); rows and split by FLamby (commit edacf54d52).
"""

from __future__ import annotations

import pytest
from tests.federation import run_processes

from atoll.plan import Plan
from atoll.simulate import simulate

PUBLISHED = {
    "cleveland": (0.75, 0.7115384615384616),
    "hungarian": (0.7528089887640449, 0.6122448979591837),
    "switzerland": (0.75, 1.0),
    "va": (0.6, 0.9047619047619048),
}
FEATURES = ["age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak", "cp_2", "cp_3", "cp_4"]
FEATURES += ["restecg_1", "restecg_2"]


def newton(rounds: int, **options: float) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "heart-newton", "rounds": rounds},
            "model": {"logistic": True},
            "data": {"features": FEATURES, "target": "y", "split": "set", "standardise": "node"},
            "aggregation": {"rule": "newton", "options": options},
            "cohort": {"minimum": 4, "deadline": "60s"},
        }
    )


def figures(by_node: dict[str, dict[str, float]]) -> dict[str, tuple[float, float]]:
    return {name: (judged["accuracy"], judged["precision"]) for name, judged in by_node.items()}


@pytest.mark.parametrize(("rounds", "damping"), [(4, 1.0), (5, 0.8)])
def test_simulated(hospitals, rounds, damping):
    assert figures(simulate(newton(rounds, damping=damping), hospitals).by_node) == PUBLISHED


def test_real_processes_embedded_log(hospitals, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(newton(4).to_json())
    history = run_processes(plan, hospitals, tmp_path)
    assert figures(history["rounds"][-1]["by_node"]) == PUBLISHED


def test_real_processes_kafka_log(hospitals, tmp_path, kafka):
    plan = tmp_path / "plan.json"
    plan.write_text(newton(4).with_(log={"kafka": kafka}).to_json())
    history = run_processes(plan, hospitals, tmp_path)
    assert figures(history["rounds"][-1]["by_node"]) == PUBLISHED
    assert history["last"] == simulate(newton(4), hospitals).digest
