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
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.served import COMMAND, ROOT, Served, served
from cluster.autoscaling import Decision, RoleScaling
from cluster.config import ClusterConfig

SETTLE_TIMES = 20.0  # `settle_seconds`, until everything is back where it began


def decisions_when_settled(cluster: Served, config: ClusterConfig) -> list[Decision]:
    """All decisions, once every role is back where it began."""
    sections = [section.autoscale for section in (config.prefill, config.decode) if section]
    slowest = max(section.settle_seconds for section in sections if section)
    deadline = time.monotonic() + SETTLE_TIMES * slowest
    while True:
        scaling = cluster.status().parts.scaling
        if is_settled(scaling, config):
            break
        if time.monotonic() > deadline:
            print("the engines did not go", file=sys.stderr)
            break
        time.sleep(1.0)
    return sorted((one for role in scaling for one in role.decisions), key=lambda one: one.at)


def is_settled(scaling: Sequence[RoleScaling], config: ClusterConfig) -> bool:
    """Whether every role is back where it began."""
    return all(one.engines == one.wanted == config.role(one.role).engines for one in scaling)


def verdict(decisions: Sequence[Decision], figures: dict[str, Any]) -> tuple[str, bool]:
    """What is said in the end, and whether all is well.

    Args:
        figures: those of `eightfold bench`.
    """
    failed = sum(kind["count"] for kind in figures["failures"].values())
    has_come_and_gone = {one.direction for one in decisions} == {"up", "down"}
    changed = "came and went" if has_come_and_gone else "did not come and go"
    return f"{failed} requests failed; engines {changed}", not failed and has_come_and_gone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "manifests" / "autoscaling.yaml")
    parser.add_argument("--rate", default="0.3@0,4@40,4@80,0.3@110")
    parser.add_argument("--duration", default="130")
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    config = ClusterConfig.load(options.config)
    figures = options.out / "load_test.json"
    with served(options.config) as cluster:
        began = time.time()
        bench = [
            *COMMAND, "bench", cluster.http, "--rate", options.rate, "--duration", options.duration,
            "--prompt-tokens", "32..200", "--answer-tokens", "48..96",
            "--json", str(figures), "--html", str(options.out / "load_test.html"),
        ]  # fmt: skip
        subprocess.run(bench, cwd=ROOT, check=False)  # a generator that was late says so itself
        decisions = decisions_when_settled(cluster, config)
    (options.out / "load_test_decisions.json").write_text(
        json.dumps([asdict(one) | {"at": round(one.at - began, 1)} for one in decisions], indent=1)
    )
    for one in decisions:
        print(f"{one.at - began:7.1f} s  {one.role:7} {one.before} -> {one.after}  {one.why}")
    told, is_well = verdict(decisions, json.loads(figures.read_text()))
    print(told)
    return int(not is_well)


if __name__ == "__main__":
    sys.exit(main())
