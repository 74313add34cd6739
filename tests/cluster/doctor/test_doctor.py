"""`eightfold doctor` on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import EXIT_FAILED, EXIT_USER_ERROR, main
from cluster.doctor import probes
from tests.authority import Authority
from tests.checkpoints import DEMO

ROOT = Path(__file__).parents[3]


def description(folder: Path, text: str) -> str:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return str(path)


def examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["doctor", *arguments, "--json"])
    return code, {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_one_process_is_looked_at_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = description(tmp_path, "gateway: {http_port: 0, grpc_port: 0}\nengine: {tokens: 8192}\n")
    assert main(["doctor", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "warning ")) for line in lines)
    assert any("checkpoint" in line and "1362 tensors" in line for line in lines)
    assert not any("Ray" in line for line in lines)


def test_a_collector_that_is_away_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        text = f"gateway: {{http_port: 0, grpc_port: 0}}\ntracing: {{endpoint: '{endpoint}'}}"
        code, found = examined(capsys, description(tmp_path, f"{text}\nengine: {{tokens: 8192}}"))
    assert code == 0
    assert found["tracing"]["level"] == "warning"
    assert endpoint in found["tracing"]["found"]


def test_a_cluster_of_its_own_needs_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roles = "prefill: {tokens: 8192}\ndecode: {tokens: 8192}\n"
    path = description(tmp_path, f"{roles}gateway: {{http_port: 0, grpc_port: 0}}\n")
    _, found = examined(capsys, path)
    assert {"name kernels", "Ray", "temporary folder", "memory", "GPUs", "clock", "disk"} <= found.keys()
    assert "prefill actor" in found["memory"]["limit"]
    assert "1 x 0.7 GiB Ray" in found["memory"]["limit"]


def test_a_taken_port_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert probes.connect_error("127.0.0.1", port) is None
        path = description(tmp_path, f"gateway: {{http_port: {port}, grpc_port: 0}}\n")
        code, found = examined(capsys, path)
    assert code == EXIT_FAILED
    assert found["gateway.http_port"]["level"] == "problem"
    assert str(port) in found["gateway.http_port"]["cure"]
    assert found["gateway.grpc_port"]["level"] == "ok"


def test_a_certificate_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain, key = Authority(tmp_path).issue(days=30)
    (tmp_path / "tls.crt").write_bytes(chain)
    (tmp_path / "tls.key").write_bytes(key)
    (tmp_path / "tls.key").chmod(0o604)
    tls = "tls: {certificate: tls.crt, key: tls.key}"
    path = description(tmp_path, f"gateway: {{http_port: 0, grpc_port: 0, {tls}}}\n")
    code, found = examined(capsys, path)
    assert code == 0
    assert found["certificate"]["found"].startswith(("expires in 30.0", "expires in 29.9"))
    assert found["certificate names"]["level"] == "ok"
    assert found["key file"]["level"] == "warning"
    (tmp_path / "tls.key").write_bytes(Authority(tmp_path).issue()[1])
    code, found = examined(capsys, path)
    assert code == EXIT_FAILED
    assert "tls.key: is not the key" in found["certificate"]["found"]
    assert "key file" not in found


def test_a_bad_checkpoint_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    path = description(
        tmp_path, f"model: {{directory: {tmp_path}}}\ngateway: {{http_port: 0, grpc_port: 0}}\n"
    )
    code, found = examined(capsys, path)
    assert code == EXIT_FAILED
    assert "model.safetensors" in found["checkpoint"]["found"]
    assert "memory" not in found


def test_a_ray_that_is_not_there_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roles = "prefill: {tokens: 8192}\ndecode: {tokens: 8192}\n"
    path = description(tmp_path, f"{roles}ray: {{address: '127.0.0.1:1'}}\n")
    code, found = examined(capsys, path)
    assert code == EXIT_FAILED
    assert found["ray.address"]["level"] == "problem"


def test_a_description_that_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", description(tmp_path, "engines: 3\n")]) == EXIT_USER_ERROR
    assert "engines" in capsys.readouterr().err


def test_a_foreign_package_kernels_is_named_before_anything_breaks(tmp_path: Path) -> None:
    """With it on the path nothing that needs our own kernels can be imported."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    result = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "doctor", "--json"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == EXIT_FAILED, result.stderr
    (finding,) = json.loads(result.stdout)
    assert finding["level"] == "problem"
    assert str(tmp_path) in finding["found"]


def test_the_machine_answers() -> None:
    assert probes.available_bytes() > 0
    free, total = probes.disk_bytes(ROOT)
    assert 0 <= free < total
    assert probes.is_clock_synchronised() in (True, False, None)
    assert probes.newest_own_file() > 0
    assert probes.listen_error("203.0.113.1", 0)
