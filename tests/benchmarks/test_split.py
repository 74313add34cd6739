"""Both sides of `benchmarks/split.py` in threads, with the demo's shapes, without a GPU; and its report."""

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.split import Job, run
from benchmarks.split_layers import Settings
from benchmarks.split_report import (
    Case,
    Compared,
    Roofline,
    Row,
    draw,
    from_json,
    least,
    ratio,
    table,
    to_json,
    touched,
)
from benchmarks.split_sides import MOST_MICRO_BATCHES, Side
from tests.workers.gpu_carriers import DirectRunner, carrier_pair
from tests.workers.test_gpu_dispatch import demo_config
from workers.transport.message import Message

CASE = Case(experts=32, context=300, batch=6)


@dataclass
class Clocked(DirectRunner):
    """As a `TimedRunner`."""

    stamps: list[float] = field(default_factory=list)

    def finish(self) -> None:
        pass

    def stamp(self) -> Callable[[], float]:
        now = time.perf_counter() * 1e6
        return lambda: now


@dataclass
class QueueWire:
    """As a `Wire`."""

    outbox: "queue.Queue[Message]"
    inbox: "queue.Queue[Message]"

    def tell(self, message: Message) -> None:
        self.outbox.put(message)

    def hear(self) -> Message:
        return self.inbox.get(timeout=60)


def both_sides(run: Callable[[Side], object]) -> list[object]:
    """What each side's thread gives."""
    wires: list[queue.Queue[Message]] = [queue.Queue(), queue.Queue()]
    carriers = carrier_pair(("attention", "experts"), 2 * MOST_MICRO_BATCHES)
    settings = Settings(
        depth=2, replays=2, max_rows=16, num_pages=32, device=torch.device("cpu"), backend="reference"
    )
    found: list[object] = [None, None]

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        wire = QueueWire(wires[rank], wires[1 - rank])
        found[rank] = run(Side(rank, demo_config(), settings, wire, {"thread": carriers[rank]}, Clocked()))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_split_and_colocated_give_what_one_process_gives() -> None:
    found, nothing = both_sides(lambda side: side.outputs(CASE, ["thread"], 2, depth=1, colocated=True))
    assert isinstance(found, dict)
    assert nothing == {}
    expected: Tensor = found["one process"].float()
    assert expected.shape == (3, demo_config().hidden_size)
    assert torch.equal(found["thread as a graph"], found["thread"])
    for way in ("thread", "colocated"):
        # Sums are rounded to bf16 before the shared expert's rows are added, and after.
        assert (found[way].float() - expected).norm() < 2**-7 * expected.norm()


def test_every_way_is_timed() -> None:
    rows, nothing = both_sides(lambda side: list(side.rows(CASE, ["thread"], [1, 3], [1, 2])))
    assert nothing == []
    assert isinstance(rows, list)
    assert [(row.layout, row.micro_batches) for row in rows] == [
        ("colocated", 1), ("colocated", 2), ("thread", 1), ("thread", 3),
    ]  # fmt: skip
    for row in rows:
        assert row.us > 0
        if row.layout == "thread":
            assert row.hidden is not None
            assert row.attention_us > 0
            assert row.experts_us > 0
            assert row.round_trip_us > 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["ipc", "copy", "nccl"])
def test_on_two_gpus_it_is_what_one_process_gives(kind: str) -> None:
    """Full-width layers with few experts, eagerly and as graphs."""
    job = Job((8,), (4096,), (16,), (kind,), (1, 2), (), depth=2, replays=2, until=math.inf)
    rows, compared = run(job)
    assert [row.layout for row in rows] == [kind, kind]
    assert len(compared) == 4
    for each in compared:
        # One layer's sums are rounded twice; the quantisation and selection of the next make more of that,
        # but not nearly as much as the rows of another layer would.
        assert each.error < (2**-7 if each.layers == 1 else 0.2)


def test_what_the_pipeline_is_expected_to_take() -> None:
    case = Case(8, 4096, 64)
    serial = Row(case, "ipc", 1, us=520, attention_us=300, experts_us=200, round_trip_us=20)
    assert serial.free_hops_us == 500
    assert serial.expected_us == 520
    assert serial.hidden == 0
    turns = Row(case, "ipc", 2, us=330, attention_us=320, experts_us=240, round_trip_us=20)
    assert turns.expected_us == 320
    assert turns.hidden == pytest.approx(0.75)
    three = Row(case, "ipc", 3, us=None, attention_us=150, experts_us=240, round_trip_us=130)
    assert three.expected_us == 260
    assert three.hidden is None
    colocated = [Row(case, "colocated", m, us) for m, us in ((1, 300), (2, 330))]
    assert ratio(turns, [serial, *colocated]) == pytest.approx(1.1)
    assert ratio(colocated[0], colocated) is None
    assert touched(256, 64) == pytest.approx(222.4, abs=0.1)
    assert touched(8, 1) == 8
    assert Roofline.of(case, 1).experts == pytest.approx(8 * 44.04e6 / 3.0e6)
    assert least(turns) > least(serial) - 100  # weights are read once more


def test_what_was_found_can_be_read_again() -> None:
    case = Case(8, 4096, 64)
    rows = [
        Row(case, "ipc", 2, 330, 320, 240, 20),
        Row(case, "colocated", 1, 300),
        Row(case, "nccl", 1, None, failure="no NCCL"),
    ]
    compared = [Compared(8, 4, "split", 0.003)]
    again, compared_again, about = from_json(to_json(rows, compared, {"title": "two GPUs"}))
    assert (again, compared_again) == (rows, compared)
    assert about == {"title": "two GPUs"}
    lines = table(rows).split("\n")
    assert len(lines) == 4
    assert lines[1].split()[:7] == ["8", "4096", "64", "ipc", "2", "330", "1.10"]
    assert lines[3].endswith("no NCCL")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        Row(Case(8, 4096, batch), layout, 1, 300) for batch in (16, 64) for layout in ("ipc", "colocated")
    ]
    draw(rows, tmp_path / "split.png", "two GPUs")
    assert (tmp_path / "split.png").stat().st_size > 1000
