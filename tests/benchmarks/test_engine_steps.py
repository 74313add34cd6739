"""What the bench of an engine's steps writes down."""

import json
from pathlib import Path

from benchmarks.engine_steps import Steps, save, table

RESULTS = [
    Steps(64, 4096, 0, "greedy", "eager", 21.16, 10.4, 10.85, 0.42),
    Steps(64, 4096, 0, "greedy", "ahead", 10.39, 1.52, 10.81, 0.96),
]


def test_a_line_for_each_mode() -> None:
    head, eager, ahead = (line.split() for line in table(RESULTS).splitlines())
    assert len(head) == len([*eager, "ms", "ms", "ms"])
    assert eager == ["64", "4096", "0", "greedy", "eager", "21.16", "10.40", "10.85", "42%"]
    assert ahead[4:6] == ["ahead", "10.39"]


def test_figures_are_kept(tmp_path: Path) -> None:
    save(tmp_path, RESULTS, {"layers": 5})
    kept = json.loads((tmp_path / "engine_steps.json").read_text())
    assert [Steps(**each) for each in kept["steps"]] == RESULTS
    assert kept["about"] == {"layers": 5}
