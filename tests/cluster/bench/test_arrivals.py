"""Arrivals: mean rate and dispersion of every pattern, and of ramps."""

import numpy as np
import pytest

from cluster.bench.arrivals import Arrivals, Pattern, RateProfile
from model.errors import RequestError


def times(pattern: Pattern, rate: str, duration: float, **options: float) -> np.ndarray:
    arrivals = Arrivals(pattern, RateProfile.parse(rate), duration, **options)  # type: ignore[arg-type]
    return np.array(list(arrivals.times(np.random.default_rng(7))))


def dispersion(moments: np.ndarray, duration: int) -> float:
    """Variance over mean of the counts in one second: 1 for Poisson, 0 for constant."""
    counts = np.histogram(moments, bins=duration, range=(0, duration))[0]
    return counts.var() / counts.mean()


@pytest.mark.parametrize(
    ("pattern", "options", "low", "high"),
    [
        ("constant", {}, 0.0, 0.05),
        ("poisson", {}, 0.9, 1.1),
        ("gamma", {"shape": 1.0}, 0.9, 1.1),
        ("gamma", {"shape": 0.25}, 3.0, 4.2),  # 1 / shape, less what one second cuts off
        ("burst", {"burst": 20}, 7.0, 11.0),
    ],
)
def test_each_pattern_keeps_the_rate_and_has_its_own_dispersion(
    pattern: Pattern, options: dict[str, float], low: float, high: float
) -> None:
    moments = times(pattern, "10", 4000, **options)
    assert len(moments) / 4000 == pytest.approx(10, rel=0.02)
    assert (np.diff(moments) >= 0).all()
    assert low <= dispersion(moments, 4000) <= high


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert np.allclose(times("constant", "4", 2.1), np.arange(1, 9) / 4)


def test_a_burst_comes_at_one_moment() -> None:
    moments = times("burst", "5", 9, burst=10)
    assert moments.tolist() == [2.0] * 10 + [4.0] * 10 + [6.0] * 10 + [8.0] * 10


@pytest.mark.parametrize("pattern", ["constant", "poisson"])
def test_a_ramp_goes_up_and_down(pattern: Pattern) -> None:
    moments = times(pattern, "0@0,40@100,0@200,0@300,10@300", 400)
    counts = np.histogram(moments, bins=[0, 50, 100, 150, 200.1, 300, 400])[0]
    expected = np.array([500, 1500, 1500, 500, 0, 1000])
    assert (abs(counts - expected) <= 5 * np.sqrt(expected) + 1).all()
    assert counts[4] == 0


def test_a_rate_of_zero_in_the_end_ends_the_load() -> None:
    moments = times("constant", "10@0,10@5,0@5", 1e6)
    assert len(moments) == 50


def test_a_seed_makes_it_again() -> None:
    first, second = times("poisson", "3", 50), times("poisson", "3", 50)
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "fast", "inf", "nan", "1@5", "1@0,2@9,3@4", "1@0,-2@9", "0@0,0@9"]
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--rate"):
        RateProfile.parse(text)
