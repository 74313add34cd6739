"""Pages from one GPU to another: what a hand-over from prefill to decode takes."""

from itertools import product
from typing import Any

import torch

from benchmarks.gpu_pairs import End
from workers.transport.cuda_memory import shared_zeros
from workers.transport.page_carrier import MappedPages, PageCarrier, StagedPages
from workers.transport.pairing import map_pools
from workers.transport.protocol import Deadline
from workers.transport.slots import SlotPlan

LAYERS = 8
PAGES = 1024
PAGE_BYTES = (64 * 656, 64 * 132)  # latents and index keys of 64 tokens of one layer
SIZES = {"4 MiB": 10, "64 MiB": 166}  # pages of each layer
ORDERS = ("in order", "scattered")
_PUSHES = 16
_SLOTS = _PUSHES  # so that the host may post all of them ahead of the device
_HEAD_START = 40_000_000  # cycles that the device sleeps meanwhile


def page_moves(end: End) -> list[dict[str, Any]]:
    """Pushes alone, with what the host takes to post them, and in a row, of pages in order and scattered."""
    shapes = [(PAGES, size) for _ in range(LAYERS) for size in PAGE_BYTES]
    pools = [shared_zeros(shape, torch.uint8, end.device) for shape in shapes]
    staged = SlotPlan(_SLOTS, max(SIZES.values()) * LAYERS * sum(PAGE_BYTES))
    carriers = [
        end.pair("ipc", SlotPlan(_SLOTS, 4096)),
        end.pair("copy", staged),
        end.pair("nccl", staged),
    ]
    theirs = map_pools(end.endpoint, end.peer, end.epoch, pools, Deadline.after(30))
    mapped = MappedPages(carriers[0], _SLOTS, pools, theirs)
    ways: dict[str, PageCarrier] = {
        "mapped": mapped,
        "staged, copy": StagedPages(carriers[1], _SLOTS, pools),
        "staged, nccl": StagedPages(carriers[2], _SLOTS, pools),
    }
    rows = []
    for (way, carrier), (size, count), order in product(ways.items(), SIZES.items(), ORDERS):
        rows.append({"way": way, "size": size, "order": order} | _measure(end, carrier, pools, count, order))
        if end.rank == 0:
            print(rows[-1], flush=True)
    mapped.close()
    for each in carriers:
        each.close()
    return rows


def _measure(
    end: End, carrier: PageCarrier, pools: list[torch.Tensor], count: int, order: str
) -> dict[str, Any]:
    source, target = (_choose(count, order, seed) for seed in (1, 2))
    sent = [_fill(pool, number, end) for number, pool in enumerate(pools)]
    wanted = range(len(pools))
    num_bytes = count * sum(pool[0].nbytes for pool in pools)

    def push(times: int, head_start: int = 0) -> float:
        """Seconds of so many pushes, up to the last acknowledgement."""
        end.agree()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if head_start and end.rank == 0:
            torch.cuda._sleep(head_start)
        began.record()
        for _ in range(times):
            is_ours = end.rank == 0
            event = carrier.push(wanted, source, target) if is_ours else carrier.expect(wanted, target)
        torch.cuda.current_stream().wait_event(event)
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3

    push(2)
    wrong = 0
    if end.rank == 1:
        ours, theirs = (torch.tensor(pages, device=end.device) for pages in (target, source))
        wrong = sum(int((pool[ours] != was[theirs]).sum()) for pool, was in zip(pools, sent, strict=True))
    return {
        "alone_us": min(push(1) for _ in range(5)) * 1e6,
        "row_gb_s": num_bytes * _PUSHES / push(_PUSHES, _HEAD_START) / 1e9,
        "wrong_bytes": wrong,
    }


def _choose(count: int, order: str, seed: int) -> list[int]:
    if order == "in order":
        return list(range(seed, seed + count))
    return torch.randperm(PAGES, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def _fill(pool: torch.Tensor, number: int, end: End) -> torch.Tensor:
    """Random pages at rank 0, which rank 1 knows."""
    generator = torch.Generator(end.device).manual_seed(number)
    sent = torch.randint(0, 256, pool.shape, dtype=torch.uint8, device=end.device, generator=generator)
    if end.rank == 0:
        pool.copy_(sent)
    return sent
