"""The HTTP interface against its own description: whatever is made up from it, no answer breaks it.

Schemathesis runs apart, for as a part of this environment it would load itself into every run of pytest.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from tests.checkpoints import DEMO
from tests.clients.test_clients import folder
from tests.cluster.gateway.serving import serve
from workers.local import LocalModel, ModelOptions

pytestmark = pytest.mark.clients

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "negative_data_rejection",
    "unsupported_method", "allow_header_conformance",
)  # fmt: skip
LIMIT_SECONDS = 400


def test_no_answer_breaks_the_description(tmp_path: Path) -> None:
    # Without a prefix the same handlers answer.
    paths = "^/(v1/.*|[a-z]+z|metrics|version|openapi.json)$"
    # A small context and short answers: what is asked for matters here, not what the model says.
    config = {
        "engine": {"tokens": 64},
        "gateway": {"http_port": 0, "grpc_port": 0, "limits": {"default_max_tokens": 2}},
    }
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(folder("schemathesis"))}
    with serve(LocalModel(DEMO, ModelOptions()), ClusterConfig.model_validate(config)) as served:
        done = subprocess.run(
            [
                sys.executable, "-S", "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json",
                "--seed", "1", "--max-examples", "15", "--phases", "coverage,fuzzing",
                "--generation-database", "none", "--checks", ",".join(CHECKS), "--include-path-regex", paths,
                "--request-timeout", "60", "--continue-on-failure", "--no-color",
            ],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    count = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert count, done.stdout[-8000:]
    assert int(count[1]) == int(count[2]) > 500
