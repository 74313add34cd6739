"""The gateways that client programs are tried on."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from tests.authority import Authority
from tests.checkpoints import DEMO
from tests.clients.tool_caller import ToolCaller
from tests.cluster.gateway.serving import Served, serve
from workers.local import LocalModel, ModelOptions

KEY = "sk-of-the-tests"


class Gateways(dict[str, Served]):
    """By name. `authority` is the file that clients trust, or None where these speak clear text."""

    authority: Path | None = None


@pytest.fixture(scope="session", params=["clear", "tls"])
def gateways(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    """One that is open to whoever has the key, one whose model calls tools, one that is about to stop, and
    one that gives a request little time: all of them in clear text, and all of them with TLS."""
    model = LocalModel(DEMO, ModelOptions())
    served, files = Gateways(), None
    if request.param == "tls":
        folder = tmp_path_factory.mktemp("tls")
        authority = Authority(folder)
        served.authority, files = (
            authority.file,
            {"certificate": folder / "tls.crt", "key": folder / "tls.key"},
        )
        for path, content in zip(files.values(), authority.issue(), strict=True):
            path.write_bytes(content)
    with ExitStack() as stack:

        def start(limits: dict[str, Any] | None = None, **options: Any) -> Served:
            key_hash = hashlib.sha256(KEY.encode()).hexdigest()
            gateway = {"http_port": 0, "grpc_port": 0, "api_key_hashes": [key_hash], "tls": files}
            gateway["limits"] = limits or {}
            config = ClusterConfig.model_validate({"engine": {"tokens": 16384}, "gateway": gateway})
            return stack.enter_context(serve(model, config, **options))

        served["open"] = start()
        served["tools"] = start(wrap=ToolCaller)
        served["draining"] = start()
        served["hasty"] = start({"total_seconds": 2})
        served["draining"].server.gateway.is_draining = True
        yield served
