"""`eightfold gateway`: HTTP and gRPC for a cluster that runs already, until SIGTERM."""

from argparse import Namespace

from cluster.commands.serve import serve
from cluster.config import ClusterConfig, ConfigError
from cluster.launch import join_cluster


def run(options: Namespace) -> int:
    """Join, serve, drain."""
    config = ClusterConfig.load(options.config)
    if not config.is_disaggregated or config.ray.address == "local":
        problem = "must have prefill and decode, and a ray.address that is not local, to be joined"
        raise ConfigError(options.config.name, "", problem)
    return serve("gateway", config, join_cluster)
