"""Carriers between two processes; those by CUDA IPC with one GPU for both, NCCL where there are two."""

from typing import Any

import pytest
import torch

from benchmarks.gpu_chains import Chain, plan_for
from benchmarks.gpu_failures import Turns, absent, frozen, killed, late_write
from benchmarks.gpu_pairs import End, gpu_pair
from workers.transport.cuda_memory import handle_of, shared_zeros
from workers.transport.page_carrier import MappedPages, PageCarrier, StagedPages
from workers.transport.pairing import CarrierKind, map_pools
from workers.transport.protocol import Deadline
from workers.transport.slots import SlotPlan

pytestmark = pytest.mark.gpu
TOKENS, PAGES, PAGE_BYTES = 20, 32, (41984, 8448)


def gpus_for(kind: str) -> tuple[int, int]:
    if kind != "nccl":
        return (0, 0)
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU for each process")
    return (0, 1)


def wrong_bytes(end: End, kind: CarrierKind, laid_out: bool) -> int:
    carrier = end.pair(kind, plan_for(TOKENS))
    found = Chain(end, carrier, TOKENS, laid_out).verify()
    carrier.close()
    return found


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("kind", ["ipc", "copy", "nccl"])
def test_every_hop_of_captured_steps_brings_what_was_sent(kind: CarrierKind, laid_out: bool) -> None:
    with gpu_pair(wrong_bytes, kind, laid_out, gpus=gpus_for(kind)) as pair:
        assert (pair.hear(0), pair.hear(1)) == (0, 0)


@pytest.mark.parametrize("kind", ["ipc", "copy", "nccl"])
def test_a_killed_peer(kind: CarrierKind) -> None:
    found = killed(kind, gpus_for(kind), Turns(1))
    assert "peer experts is lost" in found["reason"]
    assert found["healthy"]


@pytest.mark.parametrize("kind", ["ipc", "copy", "nccl"])
def test_a_frozen_peer(kind: CarrierKind) -> None:
    found = frozen(kind, gpus_for(kind), Turns(1))
    expected = "the step did not end in time" if kind == "nccl" else "nothing came within 0.5 s"
    assert expected in found["reason"]
    assert found["healthy"]


def test_a_late_write_of_an_older_pairing_is_nothing() -> None:
    found = late_write((0, 0), Turns(1))
    assert found["present_arrived"]
    assert "nothing came" in found["reason"]


def test_nccl_does_not_wait_for_ever() -> None:
    assert absent((0, 0), Turns(1))["reason"] == "deadline exceeded: meeting experts in NCCL"


def page_differences(end: End, way: str) -> list[int]:
    """Bytes of pools that are not as expected; the pushes share two slots."""
    pools = [shared_zeros((PAGES, size), torch.uint8, end.device) for size in PAGE_BYTES]
    for pool in pools:
        pool.copy_(torch.arange(PAGES).unsqueeze(1) * 3 + 1 if end.rank == 0 else torch.zeros(1))
    carrier = end.pair("copy", SlotPlan(2, PAGES * sum(PAGE_BYTES)))
    pages: PageCarrier
    if way == "mapped":
        pages = MappedPages(
            carrier, 2, pools, map_pools(end.endpoint, end.peer, 1, pools, Deadline.after(30))
        )
    else:
        pages = StagedPages(carrier, 2, pools)
    pushes: list[tuple[list[int], list[int], list[int]]] = [
        ([0, 1], [1, 2, 3, 9], [4, 5, 6, 0]), ([1], [4], [10]), ([0], [5, 30], [31, 11]),
    ]  # fmt: skip
    expected = [torch.zeros(PAGES, dtype=torch.uint8) for _ in pools]
    for which, source, target in pushes:
        event = pages.push(which, source, target) if end.rank == 0 else pages.expect(which, target)
        event.synchronize()
        carrier.check()
        for pool in which:
            expected[pool][torch.tensor(target)] = (torch.tensor(source) * 3 + 1).to(torch.uint8)
    if isinstance(pages, StagedPages):
        event = pages.push([1], [7], [7]) if end.rank == 0 else pages.skip([1], 1)
        pages.settle()
        event.synchronize()
        carrier.check()
        torch.cuda.synchronize()
        assert pages.is_idle
    end.agree()
    if end.rank == 0:
        return []
    return [int((pool.cpu() != was.unsqueeze(1)).sum()) for pool, was in zip(pools, expected, strict=True)]


@pytest.mark.parametrize("way", ["mapped", "staged"])
def test_pages(way: str) -> None:
    with gpu_pair(page_differences, way, gpus=(0, 0)) as pair:
        assert pair.hear(1) == [0, 0]


def test_only_memory_of_its_own_is_shared() -> None:
    tensor = shared_zeros((100, 3), torch.float32, torch.device("cuda", 0))
    assert not tensor.any()
    assert handle_of(tensor).shape == (64,)
    with pytest.raises(ValueError, match="shared_zeros"):
        handle_of(tensor[1:])


def test_a_failing_case_is_reported() -> None:
    with gpu_pair(_fails, gpus=(0, 0)) as pair, pytest.raises(RuntimeError, match="on purpose"):
        pair.hear(0)


def _fails(end: End) -> Any:
    raise ValueError("on purpose")
