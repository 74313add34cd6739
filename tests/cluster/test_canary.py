"""No prompt and no key in any log: one process, at the lowest level, and a search that must be able to fail.

The same of a cluster with its Ray is in test_cluster.py.
"""

import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cluster.config import ClusterConfig
from cluster.gateway.backend import Backend, TokenStream
from tests.checkpoints import DEMO
from tests.cluster.canary import Canary, everything_logged, files, heard
from tests.cluster.gateway.serving import Served, serve, wait_until
from workers.local import LocalModel, ModelOptions
from workers.sequence import Request

BROKEN = 13


class Broken:
    """Fails with an exception that names the request, where the seed is BROKEN."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def generate(self, request: Request) -> TokenStream:
        if request.params.seed == BROKEN:
            raise RuntimeError(f"cannot run {request}")
        return await self._backend.generate(request)


def fail(served: Served, canary: Canary) -> None:
    """Has a request fail inside."""
    body = {"model": "demo", "prompt": list(canary.ids), "max_tokens": 4, "seed": BROKEN}
    headers = {"authorization": f"Bearer {canary.key}"}
    answer = httpx2.post(
        f"{served.url}/v1/completions", json=body, headers=headers, trust_env=False, timeout=30
    )
    assert answer.status_code == 500
    assert not heard(canary.songs(), {"answer": answer.content})


def test_one_process_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    canary, log = Canary(), tmp_path / "log"
    gateway = {"http_port": 0, "grpc_port": 0, "api_key_hashes": [canary.key_hash]}
    config = ClusterConfig.model_validate({"gateway": gateway, "engine": {"tokens": 16384}})
    with everything_logged(log), serve(LocalModel(DEMO, ModelOptions()), config, Broken) as served:
        canary.send(served.url, served.target)
        fail(served, canary)
        wait_until(served.is_idle, 30)
        pages = {path: text.encode() for path, text in canary.pages(served.url).items()}
    logged = log.read_text()
    assert "RuntimeError: cannot run Request(uid=" in logged, "what is logged has to be seen here"
    said = capfd.readouterr()
    texts = {"log": logged.encode(), "stdout": said.out.encode(), "stderr": said.err.encode(), **pages}
    assert heard(canary.songs(), texts) == []


@pytest.mark.parametrize("what", ["prompt", "key", "digest of the key", "ids by ', '", "ids by ' '"])
def test_the_search_finds_what_is_there(what: str, tmp_path: Path) -> None:
    canary, log = Canary(), tmp_path / "logs" / "worker.out"
    log.parent.mkdir()
    with everything_logged(log):
        logging.getLogger("cluster.anything").debug("took %s on", canary.songs()[what])
    assert heard(canary.songs(), files(tmp_path)) == [f"{what} in logs/worker.out"]


def test_ids_are_found_as_python_prints_them(tmp_path: Path) -> None:
    canary, log = Canary(), tmp_path / "log"
    with everything_logged(log):
        logging.getLogger("cluster.anything").debug("ids %s", canary.ids)
    assert "ids by ', ' in log" in heard(canary.songs(), files(tmp_path))
