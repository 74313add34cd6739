"""What the benchmarks of a served cluster share: one that runs for as long as a context lasts."""

import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.gateway.status import ClusterStatus

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-c", "import sys; from cluster.cli import main; sys.exit(main(sys.argv[1:]))")
START_SECONDS, STOP_SECONDS = 300.0, 60.0


@dataclass(frozen=True)
class Served:
    """Where it is: `http://host:port`, `grpc://host:port`, and the gateway's process."""

    http: str
    grpc: str
    pid: int

    def status(self) -> ClusterStatus:
        with urllib.request.urlopen(f"{self.http}/status", timeout=10) as response:
            return ClusterStatus.from_json(response.read())


@contextmanager
def served(config: Path) -> Iterator[Served]:
    """A description that runs, on ports of its own choice."""
    described = yaml.safe_load(config.read_text())
    described["gateway"] = described.get("gateway", {}) | {"http_port": 0, "grpc_port": 0}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=config.parent) as file:
        file.write(yaml.safe_dump(described))
        file.flush()
        command = [*COMMAND, "serve", file.name]
        with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
            timer = threading.Timer(START_SECONDS, process.kill)
            timer.start()
            assert process.stdout
            addresses = addresses_in(process.stdout)
            timer.cancel()
            try:
                if addresses is None:
                    raise SystemExit("the cluster did not come up")
                yield Served(*addresses, process.pid)
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


def addresses_in(lines: Iterable[str]) -> tuple[str, str] | None:
    """URLs of HTTP and gRPC in what `eightfold serve` prints, read no further; None where it ends before."""
    http = None
    for line in lines:
        if found := re.search(r"HTTP +(http://[^/]+)/v1", line):
            http = found[1]
        elif http and (found := re.search(r"gRPC +(\S+:\d+)", line)):
            return http, f"grpc://{found[1]}"
    return None
