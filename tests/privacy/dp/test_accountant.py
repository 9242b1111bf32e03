"""ε against published figures, against dp-accounting where there is no sampling, and against itself where it solves."""

from __future__ import annotations

import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution

from atoll.errors import PrivacyError
from atoll.privacy.dp.accountant import COARSE, Release, composed, epsilon, multiplier_for, rate_within, steps_within


def test_the_field_s_own_case():
    assert epsilon(1.0, 1000, 1e-5, 0.01) == pytest.approx(1.828, abs=5e-4)


@pytest.mark.parametrize(("noise", "steps", "delta"), [(1.0, 1, 1e-5), (2.0, 10, 1e-6), (50.0, 1000, 1e-6), (5.0, 3, 0.1)])
def test_without_sampling_it_is_the_closed_form(noise, steps, delta):
    once = privacy_loss_distribution.from_gaussian_mechanism(noise, value_discretization_interval=1e-4)
    found = epsilon(noise, steps, delta)
    numeric = once.self_compose(steps).get_epsilon_for_delta(delta)
    assert found == pytest.approx(numeric, rel=1e-3, abs=1e-5)
    assert found <= numeric + 1e-6  # what is numeric is rounded up


def test_the_closed_form_gives_back_delta():
    """δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ), Balle and Wang 2018."""
    for noise, delta in ((0.3, 1e-8), (1.0, 1e-5), (20.0, 1e-3)):
        mu, eps = 1 / noise, epsilon(noise, 1, delta)
        first, second = (math.erfc(-x / math.sqrt(2)) / 2 for x in (mu / 2 - eps / mu, -mu / 2 - eps / mu))
        assert first - math.exp(eps) * second == pytest.approx(delta, rel=1e-6)


def test_extremes():
    assert epsilon(0.0, 1, 1e-5) == math.inf
    assert epsilon(1.0, 0, 1e-5) == 0.0
    assert epsilon(1.0, 5, 1e-5, 0.0) == 0.0
    assert 0 < epsilon(1e-3, 100, 1e-9) < math.inf  # far out, where Φ is no float any more
    assert epsilon(1e6, 1, 1e-3) == 0.0


def test_more_of_anything_costs_more():
    assert epsilon(1.0, 10, 1e-5) < epsilon(1.0, 11, 1e-5) < epsilon(0.9, 11, 1e-5) < epsilon(0.9, 11, 1e-6)
    assert epsilon(1.0, 10, 1e-5, 0.1) < epsilon(1.0, 10, 1e-5, 0.2) < epsilon(1.0, 10, 1e-5)


def test_releases_that_differ_add_up_as_dp_accounting_has_them():
    """As where a table grew between two runs: other rates, other numbers of steps, other noise."""
    releases = [Release(1.0, 30, 0.1), Release(0.8, 20, 0.05), Release(1.0, 30, 0.1), Release(3.0)]
    oracle = PLDAccountant(value_discretization_interval=1e-4)
    for one in releases:
        oracle.compose(PoissonSampledDpEvent(one.rate, GaussianDpEvent(one.multiplier)), one.steps)
    found = composed(releases, 1e-5)
    assert found == pytest.approx(oracle.get_epsilon(1e-5), rel=5e-3)
    assert found >= oracle.get_epsilon(1e-5) - 1e-6
    assert max(epsilon(1.0, 60, 1e-5, 0.1), epsilon(3.0, 1, 1e-5)) < found < composed([*releases, Release(9.0)], 1e-5)


def test_releases_that_are_equal_cost_what_as_many_do():
    assert composed([], 1e-5) == 0.0
    assert composed([Release(2.0, 3, 0.2)] * 4, 1e-5) == epsilon(2.0, 12, 1e-5, 0.2, COARSE)
    assert composed([Release(2.0), Release(3.0)], 1e-5) == pytest.approx(epsilon((1 / 4 + 1 / 9) ** -0.5, 1, 1e-5))
    assert composed([Release(0.0)], 1e-5) == math.inf
    with pytest.raises(PrivacyError, match="no accounting"):
        composed([Release(0.0), Release(1.0)], 1e-5)


@pytest.mark.parametrize("rate", [1.0, 0.05])
def test_what_is_solved_for_holds_and_is_tight(rate):
    noise = multiplier_for(2.0, 50, 1e-5, rate)
    assert epsilon(noise, 50, 1e-5, rate) <= 2.0 < epsilon(noise * 0.999, 50, 1e-5, rate) + 0.005
    steps = steps_within(2.0, noise, 1e-5, rate)
    assert steps == 50 or (rate < 1 and steps == 51)
    if rate < 1:
        assert rate_within(2.0, noise, 50, 1e-5) == pytest.approx(rate, rel=1e-3)


def test_what_can_t_be_solved_for():
    assert steps_within(0.1, 0.5, 1e-5) == 0
    assert rate_within(0.01, 0.2, 1000, 1e-9) == 0.0
    assert rate_within(100.0, 1.0, 10, 1e-5) == 1.0
    with pytest.raises(PrivacyError, match="raise epsilon"):
        multiplier_for(1e-9, 10**9, 1e-12)
    with pytest.raises(PrivacyError, match="above 0"):
        multiplier_for(0.0, 1, 1e-5)
    with pytest.raises(PrivacyError, match="no accounting"):
        epsilon(1.0, 1, 1.5)
