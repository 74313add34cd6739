from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.ragged_index_logits as module
from kernels.backend import UnsupportedKernel
from kernels.fp8_quant import FP8
from kernels.ragged_index_logits import Config, config_for, launch, ragged_index_logits
from tests.kernels.compiled import Compiled, compile_for_hopper


def inputs(num_queries: int, num_keys: int, num_heads: int, dim: int, device: str = "cpu") -> list[Tensor]:
    """A chunk at the end of its context; values on the e4m3 grid."""
    generator = torch.Generator().manual_seed(num_keys)
    q = torch.randn(num_queries, num_heads, dim, generator=generator).to(FP8)
    keys = torch.randn(num_keys, dim, generator=generator).to(FP8)
    scales = torch.rand(num_keys, generator=generator) + 0.5
    weights = torch.randn(num_queries, num_heads, generator=generator)
    visible = num_keys - num_queries + 1 + torch.arange(num_queries)
    return [tensor.to(device) for tensor in (q, keys, scales, weights, visible.clamp_min(0))]


def slowly(q: Tensor, keys: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    per_head = torch.einsum("thd,sd->ths", q.double(), keys.double()).relu()
    return torch.einsum("ths,th->ts", per_head, weights.double()) * scales.double()


def assert_close_where_visible(scores: Tensor, q: Tensor, keys: Tensor, *rest: Tensor) -> None:
    scales, weights, visible = rest
    assert scores.shape == (q.shape[0], keys.shape[0])
    assert scores.dtype == torch.float32
    seen = torch.arange(keys.shape[0], device=q.device) < visible.unsqueeze(1)
    wanted = slowly(q, keys, scales, weights)
    # Products of e4m3 are exact; their sums are fp32 on the CPU, some bits less in the tensor cores.
    tolerance = 1e-5 if q.device.type == "cpu" else 2e-3
    error = (scores.double() - wanted).where(seen, 0).abs().max()
    assert error <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (5, 70), (7, 7), (3, 0), (0, 9)])
def test_reference(num_queries: int, num_keys: int) -> None:
    arguments = inputs(num_queries, num_keys, 4, 16)
    scores = ragged_index_logits(*arguments, backend="reference")
    assert scores.shape == (num_queries, num_keys)
    if scores.numel():
        assert_close_where_visible(scores, *arguments)


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (5, 63), (9, 129), (2, 300), (6, 1100)])
def test_kernel(
    num_queries: int,
    num_keys: int,
    descriptors: bool,
    interpreted: Callable[..., None],
) -> None:
    interpreted(module)
    arguments = inputs(num_queries, num_keys, 8, 32)
    config = Config(4, 64, 4, 2, descriptors)
    assert_close_where_visible(launch(*arguments, config=config), *arguments)


def test_rows_that_see_nothing_read_nothing(interpreted: Callable[..., None]) -> None:
    """Rows of padding, and tiles behind what their rows see, are not written: the poison stays."""
    interpreted(module)
    q, keys, scales, weights, _ = inputs(4, 600, 8, 32)
    visible = torch.tensor([0, 0, 70, 3])
    scores = launch(q, keys, scales, weights, visible, config=Config(2, 64, 4, 2, descriptors=False))
    assert scores[:2].isnan().all()
    assert scores[2:, 128:].isnan().all()
    assert_close_where_visible(scores, q, keys, scales, weights, visible)


def test_demo_shape_through_the_launcher(interpreted: Callable[..., None]) -> None:
    interpreted(module)
    arguments = inputs(20, 90, 8, 64)
    assert_close_where_visible(ragged_index_logits(*arguments, backend="triton"), *arguments)


def test_nothing_to_do() -> None:
    assert ragged_index_logits(*inputs(0, 9, 8, 32), backend="triton").shape == (0, 9)
    assert ragged_index_logits(*inputs(3, 0, 8, 32), backend="triton").shape == (3, 0)


@pytest.mark.parametrize("num_queries", [1, 3, 4096])
@pytest.mark.parametrize("num_heads", [1, 8, 64])
def test_a_configuration_has_enough_columns(num_queries: int, num_heads: int) -> None:
    assert config_for(num_queries, num_heads).queries * num_heads >= 16


def test_refusals() -> None:
    q, keys, scales, weights, visible = inputs(2, 5, 8, 32)
    shifted = torch.zeros(keys.numel() + 8, dtype=keys.dtype)[8:].view(keys.shape)
    for wrong, message in [
        ((q.float(), keys, scales, weights, visible), "not e4m3"),
        ((q, keys[:, :16].contiguous(), scales, weights, visible), "keys of 16"),
        ((q, keys, scales[:3], weights, visible), "key scales are"),
        ((q, keys, scales, weights[:, :3], visible), "weights are"),
        ((q, keys, scales, weights, visible[:1]), "visible is"),
        ((q, keys, scales, weights, visible[:1].expand(2)), "visible must be contiguous"),
        ((q, shifted, scales, weights, visible), "keys must begin at a multiple of 16 bytes"),
        ((q.transpose(0, 1).contiguous().transpose(0, 1), keys, scales, weights, visible), "contiguous"),
        (inputs(2, 5, 6, 32), "heads 6"),
        (inputs(2, 5, 8, 48), "head dim 48"),
        (inputs(2, 5, 8, 16), "below 32"),
    ]:
        with pytest.raises(UnsupportedKernel, match=message):
            ragged_index_logits(*wrong, backend="triton")
    with pytest.raises(UnsupportedKernel, match="deterministic"):
        ragged_index_logits(q, keys, scales, weights, visible, backend="deterministic")


def compiled(num_heads: int, dim: int, config: Config) -> Compiled:
    arguments: dict[str, Any] = {"out": "*fp32", "q": "*fp8e4nv", "keys": "*fp8e4nv", "key_scales": "*fp32"}
    if config.descriptors:
        arguments["keys"] = f"tensordesc<fp8e4nv[{config.keys}, {dim}]>"
    arguments |= {"weights": "*fp32", "visible": "*i64"}
    arguments |= dict.fromkeys(("num_queries", "num_keys", "stride", "keys_per_program"), "i32")
    constants = {"H": num_heads, "D": dim, "BQ": config.queries, "BN": config.keys}
    constants |= {"DESCRIPTORS": config.descriptors, "STAGES": config.num_stages}
    return compile_for_hopper(
        module._score_tiles,
        arguments,
        constants,
        num_warps=config.num_warps,
        aligned=("stride", "keys_per_program"),
    )


@pytest.mark.parametrize(("num_queries", "num_heads", "dim"), [(4096, 64, 128), (1, 64, 128), (4096, 8, 64)])
def test_compiles_for_hopper(num_queries: int, num_heads: int, dim: int) -> None:
    kernel = compiled(num_heads, dim, config_for(num_queries, num_heads))
    assert kernel.spilled == 0
    assert kernel.wgmma > 0
    assert kernel.mma_sync == 0
    assert kernel.tma > 0  # keys come ahead of their products


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "dim"), [(64, 128), (8, 64)])
@pytest.mark.parametrize("num_keys", [1, 63, 64, 65, 2047, 2049, 16384])
def test_on_a_gpu(num_keys: int, num_heads: int, dim: int) -> None:
    for num_queries in (1, 67):
        arguments = inputs(num_queries, num_keys, num_heads, dim, "cuda")
        if num_queries > num_keys:
            arguments[-1] = torch.arange(num_queries, device="cuda").clamp_max(num_keys)
        assert_close_where_visible(ragged_index_logits(*arguments, backend="triton"), *arguments)
