"""The baseline of `benchmarks/split.py`: the demo's experts in two threads that have rows of their own."""

import threading

import torch
from torch import Tensor

from benchmarks.colocated import ColocatedExperts, Member
from kernels.list_rows import list_rows
from tests.workers.gpu_carriers import carrier_pair
from tests.workers.test_gpu_dispatch import demo_config, experts_of_groups, moe_layers, rows


def test_both_get_the_sums_of_all_experts_for_their_own_rows() -> None:
    """Two micro-batches, two layers: every slot is used again."""
    config, halves = demo_config(), (range(4), range(4, 8))
    carriers = carrier_pair(("one", "other"), num_slots=4)
    found: list[list[Tensor]] = [[], []]

    @torch.inference_mode()
    def run(rank: int) -> None:
        other = Member(carriers[rank], halves[1 - rank])
        experts = ColocatedExperts(
            config, experts_of_groups(halves[rank]), [other], num_slots=2, backend="reference"
        )
        for layer in moe_layers()[:2]:
            pending = []
            for half in (slice(0, 7), slice(7, 12)):
                x, plan, shared = own_rows(rank, half)
                choice = list_rows(*plan, **whole(), backend="reference")
                pending.append(experts.submit_quantized(layer, x, choice, lambda shared=shared: shared))
            found[rank].append(torch.cat([each.result() for each in pending]))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        x, plan, shared = own_rows(rank, slice(0, 12))
        choice = list_rows(*plan, **whole(), backend="reference")
        for layer, sums in zip(moe_layers()[:2], found[rank], strict=True):
            expected = experts_of_groups(range(8)).forward(layer, x, choice, shared)
            torch.testing.assert_close(sums, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


def own_rows(rank: int, part: slice) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Twelve rows for each rank, and of those a part."""
    (values, scales), (experts, weights), shared = rows(24)
    mine = slice(12 * rank, 12 * rank + 12)
    columns = scales[mine][part].t().contiguous()  # as a quantiser leaves them, for a multiple of four rows
    columns = torch.nn.functional.pad(columns, (0, -columns.shape[1] % 4))
    x = values[mine][part].contiguous(), columns.t()[: len(values[mine][part])]
    return x, (experts[mine][part].contiguous(), weights[mine][part].contiguous()), shared[mine][part]


def whole() -> dict[str, int]:
    config = demo_config()
    return {
        "all_experts": config.n_routed_experts,
        "num_groups": config.n_group,
        "first_expert": 0,
        "num_experts": config.n_routed_experts,
    }
