"""The search against servers that are plain functions of the rate."""

import pytest

from cluster.bench.capacity import Trial, find_capacity


class Server:
    """Meets the objectives up to a rate."""

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity
        self.rates: list[float] = []

    def __call__(self, rate: float) -> Trial:
        self.rates.append(rate)
        served = min(rate, self._capacity)
        return Trial(rate=rate, attainment=served / rate, goodput=served, is_met=rate <= self._capacity)


@pytest.mark.parametrize("capacity", [0.3, 1.0, 7.7, 123.0])
@pytest.mark.parametrize("first", [0.5, 4.0, 100.0])
def test_it_finds_the_rate_from_above_and_from_below(capacity: float, first: float) -> None:
    server = Server(capacity)
    found = find_capacity(server, first, precision=0.05, max_trials=40)
    assert found.highest is not None
    assert found.lowest_failed is not None
    assert found.highest <= capacity < found.lowest_failed <= found.highest * 1.05
    assert found.ended == "the interval is small enough"
    assert [trial.rate for trial in found.trials] == server.rates
    assert len(set(server.rates)) == len(server.rates)


def test_it_ends_after_so_many_trials() -> None:
    found = find_capacity(Server(1e9), 1.0, precision=0.1, max_trials=5)
    assert [trial.rate for trial in found.trials] == [1, 2, 4, 8, 16]
    assert (found.highest, found.lowest_failed) == (16, None)
    assert found.ended == "all 5 trials were used"


def test_a_server_that_meets_nothing_has_no_capacity() -> None:
    found = find_capacity(Server(0.0), 8.0, precision=0.1, max_trials=4)
    assert found.highest is None
    assert found.lowest_failed == 1.0


def test_the_last_trial_may_be_the_one_that_suffices() -> None:
    found = find_capacity(Server(1.4), 1.0, precision=0.5, max_trials=3)
    assert found.highest == 1.0
    assert found.lowest_failed == pytest.approx(2**0.5)
    assert found.ended == "the interval is small enough"
