"""A load that rises and falls, engines that follow it, and no request that fails.

    python -m benchmarks.load_test [--config manifests/autoscaling.yaml] [--rate 0.3@0,4@40,4@80,0.3@110]
                                   [--duration 130] [--out FOLDER]

Starts `eightfold serve` with a description, sends it a ramp with `eightfold bench`, waits until every role is
back at its least engines, and prints what was decided and why. The bench's own report, engines over time in
it, is `load_test.html`; `load_test.json` holds its figures, `load_test_decisions.json` the decisions. Exits
with 1 if a request failed, or if nothing came and went.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import yaml

from cluster.autoscaling import Decision
from cluster.config import ClusterConfig
from cluster.gateway.status import ClusterStatus

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-c", "import sys; from cluster.cli import main; sys.exit(main(sys.argv[1:]))")
START_SECONDS, STOP_SECONDS, SETTLE_TIMES = 300.0, 60.0, 20.0


@contextmanager
def served(config: Path) -> Iterator[str]:
    """The URL of a description that runs, on ports of its own choice."""
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
            urls = (re.search(r"HTTP +(http://[^/]+)/v1", line) for line in process.stdout)
            url = next((found[1] for found in urls if found), None)
            timer.cancel()
            try:
                if url is None:
                    raise SystemExit("the cluster did not come up")
                yield url
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


def status_of(url: str) -> ClusterStatus:
    with urllib.request.urlopen(f"{url}/status", timeout=10) as response:
        return ClusterStatus.from_json(response.read())


def decisions_when_settled(url: str, config: ClusterConfig) -> list[Decision]:
    """All decisions, once every role is back where it began."""
    sections = [section.autoscale for section in (config.prefill, config.decode) if section]
    slowest = max(section.settle_seconds for section in sections if section)
    deadline = time.monotonic() + SETTLE_TIMES * slowest
    while True:
        scaling = status_of(url).parts.scaling
        if all(one.engines == one.wanted == config.role(one.role).engines for one in scaling):
            break
        if time.monotonic() > deadline:
            print("the engines did not go", file=sys.stderr)
            break
        time.sleep(1.0)
    return sorted((one for role in scaling for one in role.decisions), key=lambda one: one.at)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "manifests" / "autoscaling.yaml")
    parser.add_argument("--rate", default="0.3@0,4@40,4@80,0.3@110")
    parser.add_argument("--duration", default="130")
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    config = ClusterConfig.load(options.config)
    figures = options.out / "load_test.json"
    with served(options.config) as url:
        began = time.time()
        bench = [
            *COMMAND, "bench", url, "--rate", options.rate, "--duration", options.duration,
            "--prompt-tokens", "32..200", "--answer-tokens", "48..96",
            "--json", str(figures), "--html", str(options.out / "load_test.html"),
        ]  # fmt: skip
        subprocess.run(bench, cwd=ROOT, check=False)  # a generator that was late says so itself
        decisions = decisions_when_settled(url, config)
    (options.out / "load_test_decisions.json").write_text(
        json.dumps([asdict(one) | {"at": round(one.at - began, 1)} for one in decisions], indent=1)
    )
    for one in decisions:
        print(f"{one.at - began:7.1f} s  {one.role:7} {one.before} -> {one.after}  {one.why}")
    failed = sum(kind["count"] for kind in json.loads(figures.read_text())["failures"].values())
    has_come_and_gone = {one.after > one.before for one in decisions} == {True, False}
    print(f"{failed} requests failed; engines {'came and went' if has_come_and_gone else 'did not change'}")
    return int(bool(failed) or not has_come_and_gone)


if __name__ == "__main__":
    sys.exit(main())
