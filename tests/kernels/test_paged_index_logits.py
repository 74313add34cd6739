from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.paged_index_logits as module
from kernels.backend import UnsupportedKernel
from kernels.fp8_quant import FP8
from kernels.index_pages import read_index_keys_fp8, write_index_keys_fp8
from kernels.paged_index_logits import PAGE_SIZE, Config, config_for, launch, paged_index_logits
from tests.kernels.compiled import Compiled, compile_for_hopper


def inputs(
    visible: list[int], rows_per_sequence: int, num_heads: int, dim: int, device: str = "cpu"
) -> list[Tensor]:
    """Sequences over a shuffled cache; table entries beyond what is seen point nowhere."""
    generator = torch.Generator().manual_seed(sum(visible))
    num_rows, num_sequences = len(visible), len(visible) // rows_per_sequence
    wide = max(1, -(-max(visible, default=0) // PAGE_SIZE))
    num_pages = num_sequences * wide + 3
    index_pages = torch.full((num_pages, PAGE_SIZE * (dim + 4)), 0x7F, dtype=torch.uint8)
    page_table = torch.randperm(num_pages, generator=generator)[: num_sequences * wide]
    slots = (page_table.unsqueeze(1) * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
    keys = torch.randn(len(slots), dim, generator=generator).to(FP8)
    scales = torch.rand(len(slots), generator=generator) + 0.5
    write_index_keys_fp8(index_pages, slots, keys, scales, PAGE_SIZE, backend="reference")
    page_table = page_table.view(num_sequences, wide).to(torch.int32)
    for sequence in range(num_sequences):
        rows = visible[sequence * rows_per_sequence : (sequence + 1) * rows_per_sequence]
        page_table[sequence, -(-max(rows) // PAGE_SIZE) :] = 1 << 30
    q = torch.randn(num_rows, num_heads, dim, generator=generator).to(FP8)
    weights = torch.randn(num_rows, num_heads, generator=generator)
    tensors = (q, index_pages, weights, page_table, torch.tensor(visible))
    return [tensor.to(device) for tensor in tensors]


def assert_close_where_visible(scores: Tensor, arguments: list[Tensor], rows_per_sequence: int) -> None:
    q, index_pages, weights, page_table, visible = arguments
    tolerance = 1e-5 if q.device.type == "cpu" else 2e-3  # the tensor cores keep fewer bits of a sum
    for row, seen in enumerate(visible.tolist()):
        if seen:
            page_ids = page_table[row // rows_per_sequence, : -(-seen // PAGE_SIZE)].long()
            keys, scales = read_index_keys_fp8(index_pages, page_ids, PAGE_SIZE, backend="reference")
            per_head = (q[row].double() @ keys[:seen].double().t()).relu()
            wanted = weights[row].double() @ per_head * scales[:seen].double()
            assert (scores[row, :seen].double() - wanted).abs().max() <= tolerance * wanted.abs().max()


LENGTHS = [(1, [1, 64, 0, 65, 200]), (2, [63, 64, 0, 0, 129, 130]), (3, [70, 71, 72]), (4, [5, 6, 7, 8])]


@pytest.mark.parametrize(("rows_per_sequence", "visible"), LENGTHS)
def test_reference(rows_per_sequence: int, visible: list[int]) -> None:
    arguments = inputs(visible, rows_per_sequence, 4, 16)
    scores = paged_index_logits(
        *arguments, rows_per_sequence=rows_per_sequence, max_visible=max(visible), backend="reference"
    )
    assert scores.shape == (len(visible), max(visible))
    assert_close_where_visible(scores, arguments, rows_per_sequence)


@pytest.mark.parametrize("pages", [1, 2])
@pytest.mark.parametrize(("rows_per_sequence", "visible"), LENGTHS)
def test_kernel(
    rows_per_sequence: int,
    visible: list[int],
    pages: int,
    interpreted: Callable[..., None],
) -> None:
    interpreted(module)
    arguments = inputs(visible, rows_per_sequence, 8, 32)
    config = Config(pages, 4, 2)
    scores = launch(*arguments, rows_per_sequence=rows_per_sequence, max_visible=max(visible), config=config)
    assert scores.shape == (len(visible), max(visible))
    assert_close_where_visible(scores, arguments, rows_per_sequence)


def test_rows_that_see_nothing_read_nothing(interpreted: Callable[..., None]) -> None:
    interpreted(module)
    arguments = inputs([0, 70, 0], 1, 8, 64)
    arguments[3][0] = arguments[3][2] = -1
    scores = paged_index_logits(*arguments, rows_per_sequence=1, max_visible=128, backend="triton")
    assert scores[0].isnan().all()
    assert scores[2].isnan().all()
    assert_close_where_visible(scores, arguments, 1)


def test_nothing_to_do() -> None:
    arguments = inputs([], 1, 8, 32)
    scores = paged_index_logits(*arguments, rows_per_sequence=1, max_visible=0, backend="triton")
    assert scores.shape == (0, 0)


def test_refusals() -> None:
    right = inputs([5, 70], 1, 8, 32)
    shifted = torch.zeros(right[1].numel() + 8, dtype=torch.uint8)[8:].view(right[1].shape)
    for position, wrong, message in [
        (0, right[0].float(), "not e4m3"),
        (1, right[1][:, :100].contiguous(), "pages are 100"),
        (2, right[2][:, :3], "weights are"),
        (3, right[3][:1], "1 sequences of 1"),
        (3, right[3][:, :1], "hold fewer"),
        (4, right[4][:1], "visible is"),
        (4, right[4][:1].expand(2), "visible must be contiguous"),
        (1, shifted, "pages must begin at a multiple of 16 bytes"),
        (0, right[0].transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
    ]:
        arguments = [wrong if i == position else tensor for i, tensor in enumerate(right)]
        with pytest.raises(UnsupportedKernel, match=message):
            paged_index_logits(*arguments, rows_per_sequence=1, max_visible=70, backend="triton")
    for arguments, rows_per_sequence, message in [
        (right, 5, "5 rows per sequence"),
        (inputs([5], 1, 6, 32), 1, "heads 6"),
        (inputs([5], 1, 8, 16), 1, "below 32"),
    ]:
        with pytest.raises(UnsupportedKernel, match=message):
            paged_index_logits(
                *arguments, rows_per_sequence=rows_per_sequence, max_visible=5, backend="triton"
            )
    with pytest.raises(UnsupportedKernel, match="deterministic"):
        paged_index_logits(*right, rows_per_sequence=1, max_visible=70, backend="deterministic")


def compiled(num_heads: int, dim: int, rows_per_sequence: int, config: Config) -> Compiled:
    arguments: dict[str, Any] = {"out": "*fp32", "q": "*fp8e4nv", "pages": "*fp8e4nv", "page_scales": "*fp32"}
    arguments |= {"weights": "*fp32", "page_table": "*i32", "visible": "*i64"}
    arguments |= dict.fromkeys(("table_stride", "stride", "pages_per_program"), "i32")
    constants = {"N": rows_per_sequence, "H": num_heads, "D": dim, "PAGE": PAGE_SIZE}
    constants |= {"COLUMNS": rows_per_sequence * num_heads, "STAGES": config.num_stages}
    return compile_for_hopper(
        module._score_pages,
        arguments,
        constants,
        num_warps=config.num_warps,
        aligned=("stride", "table_stride"),
    )


@pytest.mark.parametrize("rows_per_sequence", [1, 2, 4])
@pytest.mark.parametrize(("num_sequences", "length"), [(1, 4096), (32, 4096), (128, 131072)])
def test_compiles_for_hopper(rows_per_sequence: int, num_sequences: int, length: int) -> None:
    config = config_for(num_sequences, length, rows_per_sequence)
    kernel = compiled(64, 128, rows_per_sequence, config)
    assert kernel.spilled == 0
    assert kernel.wgmma > 0
    assert kernel.mma_sync == 0
    # Pages come ahead of their products: a page is four loads of 16 bytes a thread.
    assert kernel.cp_async >= 4


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "dim"), [(64, 128), (8, 64)])
@pytest.mark.parametrize("rows_per_sequence", [1, 2])
def test_on_a_gpu(rows_per_sequence: int, num_heads: int, dim: int) -> None:
    for visible in ([0, 1, 63, 64, 65, 2047], [2048, 2049, 5000, 0], [131072, 131071]):
        arguments = inputs(visible, rows_per_sequence, num_heads, dim, "cuda")
        scores = paged_index_logits(
            *arguments, rows_per_sequence=rows_per_sequence, max_visible=max(visible), backend="triton"
        )
        assert_close_where_visible(scores, arguments, rows_per_sequence)
