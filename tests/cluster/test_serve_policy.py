"""The policy in Serve's controller: it follows answers and waits for none; no Ray."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.serve_policy as serve_policy


class Supervisor:
    """Stands for the actor's handle; a test answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.answers: list[Future[int]] = []
        self.want = SimpleNamespace(remote=self._want)

    def _want(self, role: str, current: int) -> Any:
        self.asked.append((role, current))
        self.answers.append(Future())
        return SimpleNamespace(future=lambda: self.answers[-1])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(serve_policy.time, "monotonic", lambda: clock.now)
    return clock


def test_it_follows_the_supervisor_and_keeps_what_there_is_while_nobody_answers(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, current = Supervisor(), SimpleNamespace(target_num_replicas=2)
    monkeypatch.setattr(serve_policy.ray, "get_actor", lambda name, namespace: supervisor)
    policy = serve_policy.SupervisorPolicy("decode", "supervisor", "eightfold")
    assert policy(current) == policy(current) == (2, {})
    assert supervisor.asked == [("decode", 2)]  # one question at a time
    supervisor.answers[-1].set_result(4)
    assert policy(current) == (4, {})
    current.target_num_replicas = 4
    clock.now += 0.5
    assert policy(current) == (4, {})
    assert len(supervisor.asked) == 1
    clock.now += 0.6
    assert policy(current) == (4, {})
    assert supervisor.asked[-1] == ("decode", 4)
    supervisor.answers[-1].set_exception(RuntimeError("it died"))
    current.target_num_replicas = 3
    assert policy(current) == (3, {})
    clock.now += 1.1
    policy(current)
    clock.now += 11  # no answer: another question
    assert policy(current) == (3, {})
    assert len(supervisor.asked) == 4


def test_without_a_supervisor_nothing_changes(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(name: str, namespace: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(serve_policy.ray, "get_actor", nobody)
    policy = serve_policy.SupervisorPolicy("prefill", "supervisor", "eightfold")
    for _ in range(3):
        assert policy(SimpleNamespace(target_num_replicas=5)) == (5, {})
        clock.now += 2
