"""What is decided for loads made by hand, and for engines that are simulated."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from cluster.autoscaling import Autoscaler, AutoscaleSection, Bounds, Need, decide, needed
from cluster.load_meter import Load, Meter
from workers.load import WorkerLoad
from workers.wire import Role, WorkerStatus

SECTION = AutoscaleSection(max=8, objective_seconds=2.0, settle_seconds=60.0)


def decided(current: int, needs: list[Need], changed: float) -> tuple[int, str, str]:
    return decide(Bounds(1, 8), current, needs, changed, SECTION.settle_seconds)


def steady(engines: float, seconds: int = 100) -> list[Need]:
    return [Need(float(now), engines, "time", "because") for now in range(seconds)]


# Needs


@pytest.mark.parametrize(
    ("load", "engines", "why"),
    [
        (Load(0, 2), 0.0, "0.00 engines' time"),
        (Load(0, 2, busy=1.2), 1.5, "1.20 engines' time"),
        # 1,500 tokens at 500 a second are 1.5 s of 2 engines, of 2 s that are allowed.
        (Load(0, 2, requests=9, queued_tokens=1500, token_rate=500.0), 1.5, "wait: 1.50 s"),
        # 6,000 are 6 s: one more at least, and as many as keep up with 900 more each second.
        (Load(0, 2, requests=9, queued_tokens=6000, token_rate=500.0), 3.0, "6,000 prompt tokens wait: 6.00"),
        (Load(0, 2, requests=9, queued_tokens=6000, arriving_tokens=900.0, token_rate=500.0), 3.0, "6.00"),
        (Load(0, 2, requests=9, queued_tokens=6000, arriving_tokens=1900.0, token_rate=500.0), 5.0, "6.00"),
        (Load(0, 2, workers=2, requests=9, queued_tokens=3000, token_rate=500.0), 1.5, "wait: 1.50 s"),
        # One prompt is computed by one engine, however long it is.
        (Load(0, 2, requests=1, queued_tokens=90000, token_rate=500.0), 1.0, "90,000"),
        # Nothing has been learned yet.
        (Load(0, 2, requests=9, queued_tokens=6000), 0.0, "0.00 engines' time"),
    ],
)
def test_prefill_needs_engines_for_what_waits_and_for_time(load: Load, engines: float, why: str) -> None:
    need = needed("prefill", load, 2.0)
    assert need.engines == pytest.approx(engines)
    assert why in need.why


@pytest.mark.parametrize(
    ("load", "engines", "why"),
    [
        (Load(0, 2, used_pages=100, num_pages=200), 1.25, "100 of 200 pages"),
        (Load(0, 1, used_pages=100, num_pages=100), 1.25, "100 of 100 pages"),
        (Load(0, 2, requests=30, num_pages=200, batch=10.0, token_seconds=0.05), 3.0, "50.0 ms"),
        (Load(0, 2, workers=2, requests=30, num_pages=200, batch=10.0, token_seconds=0.05), 1.5, "50.0"),
        (Load(0, 2, requests=30, num_pages=200), 0.0, "0 of 200 pages"),
    ],
)
def test_decode_needs_engines_for_pages_and_for_sequences(load: Load, engines: float, why: str) -> None:
    need = needed("decode", load, 0.05)
    assert need.engines == pytest.approx(engines)
    assert why in need.why


# Decisions


def test_it_goes_up_at_once_as_far_as_needs_agree() -> None:
    needs = [
        *steady(0.5),
        *[
            Need(100.0 + i, n, "queue", why)
            for i, (n, why) in enumerate([(4.2, "x"), (3.1, "y"), (6.0, "z")])
        ],
    ]
    assert decided(1, needs, -math.inf) == (4, "queue", "z")
    assert decided(1, needs[:-1], -math.inf)[0] == 1  # not for long enough
    assert decided(1, [*needs, Need(103.0, 0.9, "time", "")], -math.inf)[0] == 1  # one moment disagrees
    assert decided(4, needs, 102.0)[0] == 4  # they are on their way


def test_it_goes_down_by_one_when_all_of_a_while_fits_into_the_others() -> None:
    assert decided(4, steady(2.2), 0.0)[0] == 3
    assert decided(4, steady(2.3), 0.0)[0] == 4  # more than three quarters of three
    assert decided(4, [*steady(0.1, 50), Need(50, 2.9, "time", ""), *steady(0.1)[51:]], 0.0)[0] == 4
    assert decided(4, steady(0.1), 45.0)[0] == 4  # it changed a moment ago
    assert decided(4, steady(0.1, 50), -math.inf)[0] == 4  # nobody has looked for long enough
    after, reason, why = decided(4, steady(0.1), 0.0)
    assert (after, reason) == (3, "settled")
    assert "last 60 s" in why


def test_it_stays_within_its_bounds() -> None:
    assert decided(1, steady(0.0), -math.inf)[0] == 1
    assert decided(8, steady(99.0), -math.inf)[0] == 8
    assert decided(2, steady(99.0), -math.inf)[0] == 8
    assert decided(9, steady(9.0), -math.inf)[0] == 8
    assert decide(Bounds(3, 4), 1, steady(0.0), 0.0, 60.0)[0] == 3


# What is learned


def status(role: Role, steps: int, **counts: float) -> WorkerStatus:
    return replace(WorkerStatus(role, WorkerLoad(num_pages=100, free_pages=100), steps=steps), **counts)


def test_rates_come_from_warm_workers_alone() -> None:
    meter = Meter(1.0)
    cold = [status("prefill", i, busy_seconds=i * 5.0, prefilled_tokens=i * 100) for i in range(9)]
    loads = [meter.read(float(i), {"e": {"w": one}}) for i, one in enumerate(cold)]
    assert loads[-1].token_rate is None
    assert loads[-1].busy == 0.0
    base = status("prefill", 10, busy_seconds=50.0, prefilled_tokens=1000)
    meter.read(9.0, {"e": {"w": base}})
    later = replace(base, steps=14, busy_seconds=50.8, prefilled_tokens=1400)
    load = meter.read(10.0, {"e": {"w": later}})
    assert load.token_rate == pytest.approx(500)
    assert load.busy == pytest.approx(0.8)
    fresh = status("prefill", 2, busy_seconds=9.0, prefilled_tokens=5)  # a successor of the same name
    assert meter.read(11.0, {"e": {"w": fresh}}).token_rate == pytest.approx(500)


@pytest.mark.parametrize(("floor", "slope"), [(0.02, 0.002), (0.0, 0.005), (0.04, 0.0)])
def test_the_batch_that_keeps_the_objective_is_learned_from_batches_that_differ(
    floor: float, slope: float
) -> None:
    meter, told = Meter(0.05), status("decode", 100)
    meter.read(0.0, {"e": {"w": told}})
    for second in range(1, 120):
        batch = 2 + second % 8
        took = floor + slope * batch
        told = replace(
            told,
            steps=told.steps + 1,
            busy_seconds=told.busy_seconds + 0.5,
            decode_seconds=told.decode_seconds + 0.5 * batch,
            decode_tokens=told.decode_tokens + round(0.5 * batch / took),
        )
        load = meter.read(second * 6.0, {"e": {"w": told}})  # longer than is measured over: no averages
    assert load.batch is not None
    if slope:
        assert load.batch == pytest.approx((0.05 - floor) / slope, rel=0.1)
    else:
        assert load.batch > 100


def test_one_sequence_at_least_is_borne_by_an_engine() -> None:
    meter, told = Meter(0.01), status("decode", 100)
    meter.read(0.0, {"e": {"w": told}})
    told = replace(told, steps=110, busy_seconds=1.0, decode_seconds=1.0, decode_tokens=10)
    load = meter.read(1.0, {"e": {"w": told}})
    assert load.token_seconds == pytest.approx(0.1)
    assert load.batch == 1.0  # ten times too slow, and more engines would not make it faster


# Simulated engines


@dataclass
class Prefills:
    """Engines that compute prompts from one queue; a new one takes a while to start, and steps last."""

    rate: float = 1000.0
    start_seconds: float = 20.0
    queue: float = 0.0
    engines: dict[str, WorkerStatus] = field(default_factory=dict)
    starting: list[float] = field(default_factory=list)
    names: int = 0

    def scale(self, now: float, wanted: int) -> None:
        while len(self.engines) + len(self.starting) < wanted:
            self.starting.append(now + self.start_seconds)
        while len(self.engines) > wanted:
            self.engines.popitem()
        for due in [due for due in self.starting if due <= now]:
            self.starting.remove(due)
            self.names += 1
            self.engines[f"e{self.names}"] = status("prefill", 0)

    def run(self, arriving: float) -> None:
        self.queue += arriving
        for name, told in self.engines.items():
            done = min(self.rate, self.queue / len(self.engines))
            self.queue -= done
            self.engines[name] = replace(
                told,
                steps=told.steps + 4 * (done > 0),
                busy_seconds=told.busy_seconds + done / self.rate,
                prefilled_tokens=told.prefilled_tokens + int(done),
                load=WorkerLoad(waiting=math.ceil(self.queue / 500), queued_tokens=int(self.queue)),
            )


def simulate(arriving: Callable[[int], float], seconds: int) -> tuple[list[int], list[float], Autoscaler]:
    """Counts wanted and queues left, second by second."""
    prefills, scaler, wanted = Prefills(), Autoscaler("prefill", 1, SECTION), 1
    counts, queues = [], []
    prefills.scale(-prefills.start_seconds, wanted)
    prefills.scale(0.0, wanted)
    for now in range(seconds):
        prefills.scale(now, wanted)
        prefills.run(arriving(now))
        told = {
            name: {
                "w" + name: replace(
                    one, load=replace(one.load, queued_tokens=int(prefills.queue / len(prefills.engines)))
                )
            }
            for name, one in prefills.engines.items()
        }
        wanted = scaler.want(wanted, told, float(now), 1e9 + now).after
        counts.append(wanted)
        queues.append(prefills.queue)
    return counts, queues, scaler


def reversals(counts: list[int]) -> int:
    steps = [later - earlier for earlier, later in pairwise(counts) if later != earlier]
    return sum((one > 0) != (other > 0) for one, other in pairwise(steps))


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6])
def test_it_follows_a_load_that_rises_and_falls_with_one_reversal(noise: float) -> None:
    draw = random.Random(7)

    def arriving(now: int) -> float:
        return (300 + 3500 * max(0.0, 1 - abs(now - 400) / 300)) * draw.uniform(1 - noise, 1 + noise)

    counts, queues, scaler = simulate(arriving, 1600)
    assert reversals(counts) == 1
    assert 4 < max(counts) <= 8
    assert counts[-1] == 1
    assert queues[-1] < 1000
    # The queue stays within what the objective allows, but for the time in which engines start.
    late = sum(queue > 2.0 * 1000 * count for queue, count in zip(queues, counts, strict=True))
    assert late < 60
    assert [d.before for d in scaler.decisions][1:] == [d.after for d in scaler.decisions][:-1]
    assert all(decision.why for decision in scaler.decisions)


def test_a_burst_is_answered_within_seconds_and_left_slowly() -> None:
    counts, _, _ = simulate(lambda now: 5000.0 if 100 <= now < 160 else 100.0, 1000)
    assert next(now for now, count in enumerate(counts) if count > 1) <= 105
    assert reversals(counts) == 1
    downs = [now for now, (one, other) in enumerate(pairwise(counts)) if other < one]
    assert all(later - earlier >= 60 for earlier, later in pairwise(downs))
    assert downs[0] >= 160 + 60
    assert counts[-1] == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mean", [500, 900, 1700, 2600])
def test_noise_settles_and_does_not_oscillate(seed: int, mean: int) -> None:
    """Poisson-like prompts of 500 tokens at a steady rate."""
    draw = random.Random(seed)

    def arriving(now: int) -> float:
        return 500.0 * sum(draw.random() < mean / 500 / 20 for _ in range(20))

    counts, _, _ = simulate(arriving, 1800)
    assert reversals(counts) <= 3  # in half an hour, most of them at its beginning
    assert sum(one != other for one, other in pairwise(counts[600:])) <= 3
    assert counts[-1] >= math.ceil(mean / 1000)


def test_an_engine_that_was_missed_goes_later_the_next_time() -> None:
    """A load that comes back every three minutes, after which two and a half of them are quiet."""
    counts, _, scaler = simulate(lambda now: 3000.0 if now % 180 < 30 else 50.0, 3600)
    downs = [decision.at for decision in scaler.decisions if decision.after < decision.before]
    assert reversals(counts[:600]) >= 1
    assert reversals(counts[1800:]) == 0, downs


def test_a_supervisor_that_starts_anew_takes_nothing_away_at_first() -> None:
    """Nothing is known of the time before, and Serve says how many there shall be."""
    scaler = Autoscaler("decode", 1, SECTION)
    engines = {f"{i}": {f"w{i}": status("decode", 50)} for i in range(5)}
    wanted = [scaler.want(5, engines, float(now), 0.0).after for now in range(70)]
    assert wanted[:60] == [5] * 60
    assert wanted[60] == 4
    shown = scaler.shown()
    assert shown.engines == 5
    assert len(shown.decisions) == 1  # said once, however often it is asked for


def test_engines_that_are_lost_for_long_are_not_taken_for_needless() -> None:
    scaler = Autoscaler("decode", 1, SECTION)
    both = {f"{i}": {f"w{i}": status("decode", 50)} for i in range(2)}
    told = [*[both] * 30, *[{}] * 100, *[both] * 70]
    wanted = [scaler.want(2, engines, float(now), 0.0).after for now, engines in enumerate(told)]
    assert wanted.index(1) == 130 + 59  # the last moment without them is the 130th


def test_the_last_engine_goes_only_where_nothing_at_all_was_needed() -> None:
    none = Bounds(0, 8)
    assert decide(none, 1, steady(0.0), 0.0, 60.0)[:2] == (0, "settled")
    assert (
        decide(none, 1, [*steady(0.0, 50), Need(50, 0.01, "time", ""), *steady(0.0)[51:]], 0.0, 60.0)[0] == 1
    )
    assert decide(none, 0, steady(0.0), 0.0, 60.0)[0] == 0
    assert decide(none, 0, [Need(0.0, 1.0, "called", "why")], 0.0, 60.0) == (1, "called", "why")  # at once
    assert decide(none, 1, steady(1.0), 0.0, 60.0)[0] == 1  # it starts, and there is no other to call for


@pytest.mark.parametrize(
    ("load", "parts", "predicted"),
    [
        (Load(0, 0), {"time": 0.0, "called": 1.0}, None),
        (Load(0, 1, is_used=True), {"time": 0.01, "called": 1.0}, None),
        (
            Load(0, 2, requests=9, queued_tokens=1500, token_rate=500.0, busy=0.4),
            {"time": 0.5, "queue": 1.5, "called": 1.0},
            1.5,
        ),
    ],
)
def test_a_need_says_what_it_is_for_each_reason(
    load: Load, parts: dict[str, float], predicted: float | None
) -> None:
    need = needed("prefill", load, 2.0, is_called=True)
    assert dict(need.parts) == pytest.approx(parts)
    assert need.engines == max(parts.values())
    assert need.predicted_seconds == predicted
