"""What the supervisor knows and decides, without Ray: engines that register, fail, and are called for."""

from typing import Any

import pytest

import cluster.supervisor as supervisor_module
from cluster.config import ClusterConfig
from cluster.directory import WorkerEntry
from cluster.supervisor import Supervisor, new_secrets
from workers.load import WorkerLoad
from workers.transport.protocol import Address
from workers.wire import Role, WorkerStatus


class Clock:
    """Stands for `time` in the supervisor."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(supervisor_module, "time", clock)
    return clock


def a_supervisor(**prefill: Any) -> Supervisor:
    scale = {"max": 3, "objective_seconds": 1.0, "settle_seconds": 10.0}
    description = {
        "prefill": {"autoscale": scale, **prefill},
        "decode": {"engines": 2, "attention_actors": 2},
    }
    return Supervisor(ClusterConfig.model_validate(description), new_secrets())


def register(
    supervisor: Supervisor, role: Role, engine: str, *, steps: int = 50, leaving: bool = False
) -> None:
    entry = WorkerEntry(role, engine, "node", 1, Address(f"{engine}-0"))
    status = WorkerStatus(role, WorkerLoad(num_pages=9, free_pages=9), steps=steps, leaving=leaving)
    supervisor.register(engine, (entry,), {}, {f"{engine}-0": status})


def pass_time(supervisor: Supervisor, clock: Clock, current: int, seconds: int, *engines: str) -> list[int]:
    """What is wanted, second by second, by somebody who follows."""
    wanted = []
    for _ in range(seconds):
        clock.now += 1.0
        for engine in engines:
            register(supervisor, "prefill", engine)
        current = supervisor.want("prefill", current)
        wanted.append(current)
    return wanted


def test_what_there_shall_be_is_said_for_every_role(clock: Clock) -> None:
    supervisor = a_supervisor()
    prefill, decode = supervisor.directory().engines
    assert (prefill.role, prefill.wanted, prefill.workers) == ("prefill", 1, 1)
    assert (decode.role, decode.wanted, decode.workers) == ("decode", 2, 2)
    assert pass_time(supervisor, clock, 2, 1, "a", "b") == [2]
    assert supervisor.directory().engines[0].wanted == 2


def test_engines_that_fail_to_start_wait_and_their_reason_is_shown_until_one_comes_up(clock: Clock) -> None:
    supervisor = a_supervisor()
    assert supervisor.begin("decode").wait_seconds == 0.0
    supervisor.failed("decode", "no room")
    supervisor.failed("decode", "no room at all")
    assert supervisor.begin("decode").wait_seconds == 2.0
    assert supervisor.begin("prefill").wait_seconds == 0.0
    shown = supervisor.directory().engines[1]
    assert shown.failed_starts == 2
    assert shown.last_failure
    assert shown.last_failure.why == "no room at all"
    register(supervisor, "decode", "d")
    assert supervisor.begin("decode").wait_seconds == 0.0
    assert supervisor.directory().engines[1].last_failure is None
    supervisor.failed("decode", "no room")
    register(supervisor, "decode", "d")  # again and again: it is no other engine
    assert supervisor.begin("decode").wait_seconds == 1.0


def test_the_last_prefill_engine_goes_when_nothing_is_needed_and_comes_when_called(clock: Clock) -> None:
    supervisor = a_supervisor(engines=0)
    wanted = pass_time(supervisor, clock, 1, 12, "a")
    assert wanted[:9] == [1] * 9
    assert wanted[-1] == 0
    register(supervisor, "prefill", "a", leaving=True)
    assert pass_time(supervisor, clock, 0, 8) == [0] * 8
    supervisor.directory(calls_prefill=True)
    assert pass_time(supervisor, clock, 0, 1) == [1]
    assert pass_time(supervisor, clock, 1, 60) == [1] * 60  # however long it takes to start
    decisions = supervisor.directory().scaling[0].decisions
    assert [(one.before, one.after, one.reason) for one in decisions] == [(1, 0, "settled"), (0, 1, "called")]
    assert supervisor.directory().scaling[0].counts == (("down", "settled", 1), ("up", "called", 1))


def test_an_engine_that_is_not_warm_and_computes_now_and_then_is_not_taken_for_idle(clock: Clock) -> None:
    supervisor = a_supervisor(engines=0)
    for steps in range(8):  # fewer than it takes to be warm
        register(supervisor, "prefill", "a", steps=steps)
        assert supervisor.want("prefill", 1) == 1
        clock.now += 4.0


def test_one_that_starts_anew_while_engines_scale_leaves_them_alone(clock: Clock) -> None:
    """Two of three engines work, a third starts, and a fourth drains: nobody knows, nothing is changed."""
    supervisor = a_supervisor()
    for _ in range(30):
        clock.now += 1.0
        register(supervisor, "prefill", "a")
        register(supervisor, "prefill", "b")
        register(supervisor, "prefill", "old", leaving=True)
        assert supervisor.want("prefill", 3) == 3
    assert pass_time(supervisor, clock, 3, 8, "a", "b", "c") == [3] * 8  # from when all are there
    assert pass_time(supervisor, clock, 3, 4, "a", "b", "c")[-1] == 2
