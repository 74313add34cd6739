import json

from benchmarks.gpu_hops import RESULTS, tables


def test_tables_of_a_recorded_run() -> None:
    report = json.loads((RESULTS / "gpu_hops_2026-11-22.json").read_text())
    lines = tables(report).splitlines()
    assert [line.split()[0] for line in lines[3:12:3]] == ["ipc", "copy", "copy,"]
    assert "wrong bytes: 0" in lines
    assert sum(line.startswith("pages, ") for line in lines) == len(report["pages"]) == 12
    assert any(line.startswith("killed, nccl: reason carrier to experts") for line in lines)


def test_parts_that_did_not_run_are_left_out() -> None:
    assert tables({"date": "2026-11-22"}) == ""
