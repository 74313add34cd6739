"""The command `serve` as a user starts it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.cluster.gateway.serving import ENDLESS

ROOT = Path(__file__).parents[2]
MAIN = """
import sys, torch
from argparse import Namespace
from pathlib import Path
from cluster.commands.serve import run
torch.set_num_threads(1)
sys.exit(run(Namespace(config=Path(sys.argv[1]))))
"""


class Command:
    """`serve` in a process of its own, ready."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.banner = ""
        assert process.stdout
        for line in process.stdout:
            self.banner += line
            if "Ctrl-C lets" in line:
                break
        found = re.search(r"HTTP +(http://[^/]+)/v1", self.banner)
        assert found, self.banner
        self.url = found[1]


@contextmanager
def running(tmp_path: Path, text: str = "", seconds: float = 60) -> Iterator[Command]:
    """The command with a description of its own; killed where it does not end by itself."""
    config = tmp_path / "cluster.yaml"
    config.write_text(text or "gateway: {http_port: 0, grpc_port: 0}\n")
    arguments = [sys.executable, "-c", MAIN, str(config)]
    with subprocess.Popen(
        arguments, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            yield Command(process)
        finally:
            timer.cancel()
            process.kill()
            assert process.stdout
            assert process.stderr
            process.stdout.read()
            process.stderr.read()


def shell(line: str) -> str:
    return subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout


def test_the_banner_s_lines_work_and_ctrl_c_drains(tmp_path: Path) -> None:
    with running(tmp_path) as command:
        for fact in (
            "model    demo, weights decc029080f8",
            "8,192 tokens",
            "room for 65,536",
            "API keys off",
        ):
            assert fact in command.banner
        if shutil.which("curl"):
            curl = re.search(r"curl -N .*\\\n.*", command.banner)
            assert curl
            assert "data: [DONE]" in shell(curl[0])
        python = re.search(r"python3 (-c .*)", command.banner)
        assert python
        assert "harbor" in shell(f"{sys.executable} {python[1]}")

        body = {**ENDLESS, "max_tokens": 60}
        with (
            httpx2.Client(trust_env=False, timeout=30) as client,
            client.stream("POST", f"{command.url}/v1/chat/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            command.process.send_signal(signal.SIGINT)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert command.process.wait(30) == 0
        assert command.process.stderr
        said = command.process.stderr.read()
    assert "taking no more requests" in said
    assert "1 requests are open" in said
    assert said.rstrip().endswith("stopped")
    assert "Traceback" not in said


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    with (
        running(tmp_path) as command,
        httpx2.Client(trust_env=False, timeout=30) as client,
        client.stream("POST", f"{command.url}/v1/chat/completions", json=ENDLESS) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        command.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        started = time.perf_counter()
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(10) == 130
        assert time.perf_counter() - started < 5
        with pytest.raises(httpx2.RemoteProtocolError):
            list(lines)


@pytest.mark.ray
def test_a_pool_of_experts_serves_the_same_answer_and_leaves_nothing_behind(tmp_path: Path) -> None:
    text = "gateway: {http_port: 0, grpc_port: 0}\nexperts: {placement: pool, nodes: 8}\n"
    with running(tmp_path, text, seconds=180) as command:
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": 'What does "harbor" mean?'}],
            "temperature": 0,
        }
        with httpx2.Client(trust_env=False, timeout=60) as client:
            answer = client.post(f"{command.url}/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == "Noun: a person who is harbor of a woman."
        children = subprocess.run(
            ["pgrep", "-P", str(command.process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        assert children, "Ray's processes are children of the command"
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(60) == 0
        assert not any(Path(f"/proc/{child}").exists() for child in children)
