"""Serve's side of autoscaling: its controller asks the supervisor how many engines there shall be.

Serve copies this module into its controller by value, and calls the policy in the controller's own event loop
several times a second: nothing here waits, and nothing heavy is imported.
"""

import time
from concurrent.futures import Future
from typing import Any

import ray

_ASK_SECONDS = 1.0
_ANSWER_SECONDS = 10.0


class SupervisorPolicy:
    """Follows the supervisor; where it cannot be asked, everything stays as it is.

    Args:
        role: whose engines.
        supervisor, namespace: the actor's name.
    """

    def __init__(self, role: str, supervisor: str, namespace: str) -> None:
        self._role, self._supervisor, self._namespace = role, supervisor, namespace
        self._answer: Future[int] | None = None
        self._asked = 0.0
        self._wanted: int | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's interface: the number of replicas, and no state for it to keep."""
        since = time.monotonic() - self._asked
        if self._answer and self._answer.done():
            self._wanted = None if self._answer.exception() else self._answer.result()
            self._answer = None
        elif self._answer and since > _ANSWER_SECONDS:
            self._answer = self._wanted = None
        if self._answer is None and since > _ASK_SECONDS:
            self._ask(context.target_num_replicas)
        return context.target_num_replicas if self._wanted is None else self._wanted, {}

    def _ask(self, current: int) -> None:
        self._asked = time.monotonic()
        try:
            supervisor = ray.get_actor(self._supervisor, namespace=self._namespace)
        except (ValueError, ray.exceptions.RayError):  # it starts, or starts anew
            self._wanted = None
            return
        self._answer = supervisor.want.remote(self._role, current).future()
