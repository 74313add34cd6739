"""What is said of a cluster that does not come up."""

from types import SimpleNamespace

from cluster.launch import _reasons

MESSAGE = """The deployment failed to start 2 times in a row. See logs for details. Error:
RuntimeError: Traceback (most recent call last):
  File "replica.py", line 100, in initialize
ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task, (pid=1)
  File "workers/local.py", line 12, in __init__
kernels.backend.UnsupportedKernel: linear: cannot be had here
"""


def test_replicas_that_fail_say_why_and_nothing_else() -> None:
    deployment = SimpleNamespace(message=MESSAGE)
    apps = {role: SimpleNamespace(deployments={role: deployment}) for role in ("prefill", "decode")}
    found = _reasons(SimpleNamespace(applications=apps))
    assert found == "; kernels.backend.UnsupportedKernel: linear: cannot be had here"


def test_a_cluster_that_is_only_slow_has_no_reasons() -> None:
    apps = {"decode": SimpleNamespace(deployments={"decode": SimpleNamespace(message="")})}
    assert _reasons(SimpleNamespace(applications=apps)) == ""
