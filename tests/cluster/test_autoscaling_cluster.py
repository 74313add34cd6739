"""Engines that come and go in a cluster on a Ray of the test's own, while requests run."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.autoscaling import AutoscaleSection, RoleScaling
from cluster.cli import main
from cluster.commands.serve import EMBEDDED
from cluster.config import ClusterConfig
from tests.cluster.clusters import Cluster, running, wait_until
from workers.wire import Role, WorkerStatus

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray warns of much

LONG, NUM_LONG = 900, 4


def workers(cluster: Cluster, role: str) -> set[str]:
    return {entry.address.name for entry in cluster.backend.directory.workers if entry.role == role}


def decoding(cluster: Cluster) -> list[WorkerStatus]:
    """What decode workers say that have said anything: only they are sent requests."""
    told = [status for status in cluster.backend.statuses.values() if status.load.num_pages]
    return [status for status in told if status.role == "decode"]


def scaling(cluster: Cluster) -> tuple[RoleScaling, ...]:
    return cluster.backend.directory.scaling


def resize(config: ClusterConfig, role: Role, engines: int) -> None:
    """So many engines from now on; nothing else of them changes."""
    from ray import serve  # its warnings are errors while tests are collected

    from cluster.engines import deployment

    bound = deployment(role, config)._bound_deployment
    target = serve.RunTarget(bound.options(num_replicas=engines).bind(role, config), role, None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def test_an_engine_that_goes_finishes_its_streams_first() -> None:
    config = ClusterConfig.load(EMBEDDED)
    assert config.decode
    config = config.model_copy(update={"decode": config.decode.model_copy(update={"engines": 2})})
    with running(config) as cluster, ThreadPoolExecutor(32) as threads:
        wait_until(lambda: len(cluster.backend.statuses) == 3)
        prompts = [(7 + i, 8, 9) for i in range(NUM_LONG)]
        long = [threads.submit(cluster.complete, prompt, max_tokens=LONG) for prompt in prompts]
        wait_until(lambda: cluster.num_decoding == NUM_LONG, 30)
        assert all(status.load.running == NUM_LONG // 2 for status in decoding(cluster))
        resize(config, "decode", 1)
        wait_until(lambda: any(status.leaving for status in cluster.backend.statuses.values()), 30)
        assert not any(one.done() for one in long)
        short = [threads.submit(cluster.complete, (i, 3), max_tokens=4) for i in range(20)]
        assert {one.result().status_code for one in short} == {200}
        assert len(workers(cluster, "decode")) == 2  # shown as long as it runs something
        answers = [one.result() for one in long]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {LONG}
        wait_until(lambda: len(workers(cluster, "decode")) == 1, 30)
        last = cluster.complete((1, 2, 3), max_tokens=4)
        assert last.status_code == 200, last.text


def test_engines_come_with_the_load_and_go_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    """With an objective that no engine keeps each sequence needs one; of prefill there may be none."""
    config = ClusterConfig.load(EMBEDDED)
    assert config.decode
    assert config.prefill
    scale = AutoscaleSection(max=2, objective_seconds=1e-4, settle_seconds=6)
    none = {"engines": 0, "autoscale": AutoscaleSection(max=1, objective_seconds=1.0, settle_seconds=6)}
    config = config.model_copy(
        update={
            "prefill": config.prefill.model_copy(update=none),
            "decode": config.decode.model_copy(update={"autoscale": scale}),
        }
    )
    with running(config) as cluster, ThreadPoolExecutor(8) as threads:
        assert len(workers(cluster, "decode")) == 1
        assert not workers(cluster, "prefill")
        long = threads.submit(cluster.complete, tuple(range(100, 800)), max_tokens=4)
        assert cluster.complete((5, 6), max_tokens=4).status_code == 200  # a short prompt waits for nobody
        assert not long.done()
        assert long.result().status_code == 200
        assert workers(cluster, "prefill")
        load = [threads.submit(cluster.complete, (7 + i, 8), max_tokens=600) for i in range(4)]
        wait_until(lambda: len(workers(cluster, "decode")) == 2, 60)
        wait_until(lambda: len(decoding(cluster)) == 2, 10)
        more = [threads.submit(cluster.complete, (70 + i, 8), max_tokens=20) for i in range(4)]
        assert {one.result().status_code for one in (*load, *more)} == {200}
        assert all(status.tokens for status in decoding(cluster))  # the new one had some
        wait_until(lambda: len(workers(cluster, "decode")) == 1, 60)
        last = cluster.complete((1, 2, 3), max_tokens=4)
        assert last.status_code == 200, last.text
        wait_until(lambda: not workers(cluster, "prefill"), 60)
        wait_until(lambda: all(role.decisions[-1].direction == "down" for role in scaling(cluster)), 60)
        assert [one.after for one in scaling(cluster)[1].decisions] == [2, 1]
        assert main(["status", cluster.url]) == 0
    told = capsys.readouterr().out
    assert "prefill from 0 to 1: requests came and there was no engine" in told
    assert "prefill from 1 to 0: 0 engine(s) bear all of the last 6 s" in told
    assert "decode from 1 to 2: " in told
    assert "ms from token to token" in told
    assert "decode from 2 to 1: 1 engine(s) bear all of the last 6 s" in told
