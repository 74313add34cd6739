"""The same description on eight nodes: an expert actor on each, engines where their labels say."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

from cluster.config import ClusterConfig
from cluster.expert_pool import ExpertPool
from cluster.ray_runtime import ray_settings
from tests.checkpoints import DEMO
from tests.cluster.clusters import running

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray warns of much


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head and eight nodes of Ray on this machine."""
    with ray_settings(), ExitStack() as stack:
        nodes = Nodes(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "labels": {"role": "attention"},
                "object_store_memory": 80 * 2**20,
            },
        )
        stack.callback(nodes.shutdown)
        for _ in range(8):
            nodes.add_node(wait=False, num_cpus=1, labels={"role": "expert"}, object_store_memory=80 * 2**20)
        nodes.wait_for_nodes(timeout=120)
        stack.callback(ray.shutdown)
        yield nodes


def test_every_expert_actor_has_a_node_of_its_own(nodes: Nodes) -> None:
    config = ClusterConfig.model_validate(
        {
            "experts": {"placement": "pool", "spread": "strict", "node_labels": {"role": "expert"}},
            "prefill": {"node_labels": {"role": "attention"}},
            "decode": {"node_labels": {"role": "attention"}},
            "ray": {"address": nodes.address},
        }
    )
    with running(config) as cluster:
        directory = cluster.backend.directory
        expert_nodes = {entry.node for entry in directory.experts}
        assert len(expert_nodes) == len(directory.experts) == 8
        worker_nodes = {entry.node for entry in directory.workers}
        assert len(worker_nodes) == 1
        assert not worker_nodes & expert_nodes
        response = cluster.complete((5, 6, 7, 8), max_tokens=4)
        assert response.status_code == 200, response.text


def test_nodes_that_are_not_there_are_said(nodes: Nodes) -> None:
    ray.init(address=nodes.address, log_to_driver=False)
    with pytest.raises(TimeoutError, match="no place for 8 expert actors"):
        ExpertPool(DEMO, 8, spread="strict", node_labels={"role": "nobody"}, place_seconds=3)
