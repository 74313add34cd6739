"""Engines that come and go in a cluster on a Ray of the test's own, while requests run."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.autoscaling import AutoscaleSection
from cluster.cli import main
from cluster.commands.serve import EMBEDDED
from cluster.config import ClusterConfig
from tests.cluster.clusters import Cluster, running, wait_until
from workers.wire import Role

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray warns of much

LONG, NUM_LONG = 900, 4


def workers(cluster: Cluster, role: str) -> set[str]:
    return {entry.address.name for entry in cluster.backend.directory.workers if entry.role == role}


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
        decoding = {n: s for n, s in cluster.backend.statuses.items() if s.role == "decode"}
        assert all(status.load.running == NUM_LONG // 2 for status in decoding.values())
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
        assert cluster.complete((1, 2, 3), max_tokens=4).status_code == 200


def test_engines_come_with_the_load_and_go_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    """With an objective that no engine keeps each running sequence needs one."""
    config = ClusterConfig.load(EMBEDDED)
    assert config.decode
    scale = AutoscaleSection(max=2, objective_seconds=1e-4, settle_seconds=6)
    config = config.model_copy(update={"decode": config.decode.model_copy(update={"autoscale": scale})})
    with running(config) as cluster, ThreadPoolExecutor(8) as threads:
        assert len(workers(cluster, "decode")) == 1
        load = [threads.submit(cluster.complete, (7 + i, 8), max_tokens=600) for i in range(4)]
        wait_until(lambda: len(workers(cluster, "decode")) == 2, 60)
        wait_until(lambda: len(cluster.backend.statuses) == 3, 10)
        more = [threads.submit(cluster.complete, (70 + i, 8), max_tokens=20) for i in range(4)]
        assert {one.result().status_code for one in (*load, *more)} == {200}
        assert all(status.tokens for status in cluster.backend.statuses.values())  # the new one had some
        wait_until(lambda: len(workers(cluster, "decode")) == 1, 60)
        assert cluster.complete((1, 2, 3), max_tokens=4).status_code == 200
        wait_until(lambda: len(cluster.backend.directory.scaling[0].decisions) == 2, 10)
        assert main(["status", cluster.url]) == 0
    told = capsys.readouterr().out
    assert "decode from 1 to 2: " in told
    assert "ms from token to token" in told
    assert "decode from 2 to 1: 1 engine(s) bear all of the last 6 s" in told
