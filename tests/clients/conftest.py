"""The gateways that client programs are tried on."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from cluster.config import ClusterConfig
from tests.checkpoints import DEMO
from tests.clients.tool_caller import ToolCaller
from tests.cluster.gateway.serving import Served, serve
from workers.local import LocalModel, ModelOptions

KEY = "sk-of-the-tests"


@pytest.fixture(scope="session")
def gateways() -> Iterator[dict[str, Served]]:
    """One that is open to whoever has the key, one whose model calls tools, one that is about to stop, and
    one that gives a request little time."""
    model = LocalModel(DEMO, ModelOptions())
    with ExitStack() as stack:

        def start(limits: dict[str, Any] | None = None, **options: Any) -> Served:
            key_hash = hashlib.sha256(KEY.encode()).hexdigest()
            gateway = {"http_port": 0, "grpc_port": 0, "api_key_hashes": [key_hash], "limits": limits or {}}
            config = ClusterConfig.model_validate({"engine": {"tokens": 16384}, "gateway": gateway})
            return stack.enter_context(serve(model, config, **options))

        served = {
            "open": start(),
            "tools": start(wrap=ToolCaller),
            "draining": start(),
            "hasty": start({"total_seconds": 2}),
        }
        served["draining"].server.gateway.is_draining = True
        yield served
