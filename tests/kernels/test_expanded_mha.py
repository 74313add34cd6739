from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.expanded_mha as module
from kernels.backend import UnsupportedKernel
from kernels.expanded_mha import expanded_mha
from kernels.latent_tiles import TileConfig
from tests.kernels.compiled import compile_for_hopper

SCALE = 0.12


def exactly(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, selected: Tensor | None) -> Tensor:
    """Float64; a mask made row by row."""
    seen = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
    for t in range(len(q)):
        chosen = slice(0, int(visible[t])) if selected is None else selected[t][selected[t] >= 0].long()
        seen[t, chosen] = True
    scores = torch.einsum("thd,lhd->htl", q.double(), k.double()) * SCALE
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("htl,lhv->thv", weights, v.double())


def random_case(
    num_rows: int, num_keys: int, heads: int, width: int, value_width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(num_rows, heads, width, generator=generator)
    k = torch.randn(num_keys, heads, width, generator=generator)
    v = torch.randn(num_keys, heads, value_width, generator=generator)
    return q, k, v, torch.arange(num_keys - num_rows + 1, num_keys + 1)


def choose(visible: Tensor, k: int, generator: torch.Generator) -> Tensor:
    selected = torch.full((len(visible), k), -1, dtype=torch.int32)
    for t, count in enumerate(visible.tolist()):
        chosen = torch.randperm(count, generator=generator)[:k].int()
        selected[t, : len(chosen)] = chosen
    return selected


@pytest.mark.parametrize("width", [64, 48])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (17, 33), (40, 40), (20, 100)])
def test_kernel_interpreted(
    num_rows: int,
    num_keys: int,
    masked: bool,
    width: int,
    interpreted: Callable[..., None],
    generator: torch.Generator,
) -> None:
    interpreted(module)
    q, k, v, visible = random_case(num_rows, num_keys, 2, width, 32, generator)
    if num_rows > 10:
        visible[:2] = 0
    selected = choose(visible, 20, generator) if masked else None
    out = module._launch(q, k, v, visible, selected, SCALE, TileConfig(16, 32, 4, 1))
    expected = exactly(q, k, v, visible, selected)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    if num_rows > 10:
        assert (out[:2] == 0).all()
    plain = expanded_mha(q, k, v, visible, selected, SCALE, backend="reference")
    torch.testing.assert_close(plain.double(), expected, atol=1e-5, rtol=0)


def test_refusals() -> None:
    q, v = torch.zeros(2, 3, 64, dtype=torch.bfloat16), torch.zeros(2, 3, 32, dtype=torch.bfloat16)
    visible = torch.ones(2, dtype=torch.int32)
    with pytest.raises(UnsupportedKernel, match="query width 64, key width 32"):
        expanded_mha(q, v, v, visible, None, 1.0, backend="triton")
    with pytest.raises(UnsupportedKernel, match="needs bfloat16"):
        expanded_mha(q.float(), q.float(), v.float(), visible, None, 1.0, backend="triton")
    with pytest.raises(UnsupportedKernel, match="no heads of 64 and 24 channels"):
        expanded_mha(q, q, v[..., :24].contiguous(), visible, None, 1.0, backend="triton")
    with pytest.raises(UnsupportedKernel, match="2 queries, 1 lengths"):
        expanded_mha(q, q, v, visible[:1], None, 1.0, backend="triton")
    chosen = torch.zeros(2, 6, dtype=torch.int32)
    with pytest.raises(UnsupportedKernel, match="choices of 1"):
        expanded_mha(q, q, v, visible, chosen[:1], 1.0, backend="triton")
    with pytest.raises(UnsupportedKernel, match="rows of choices must be contiguous"):
        expanded_mha(q, q, v, visible, chosen[:, ::2], 1.0, backend="triton")
    shifted = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    with pytest.raises(UnsupportedKernel, match="keys must begin at a multiple of 16 bytes"):
        expanded_mha(q, shifted, v, visible, None, 1.0, backend="triton")


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_for_hopper(masked: bool) -> None:
    config = module._config_for()
    kinds = {"q": "*bf16", "visible": "*i32", "mask": "*i32", "out": "*bf16"}
    n = config.block_keys
    kinds |= {"k_low": f"tensordesc<bf16[{n}, 128]>", "k_high": f"tensordesc<bf16[{n}, 64]>"}
    kinds |= {"v": f"tensordesc<bf16[{n}, 128]>"}
    made = compile_for_hopper(
        module._attend,
        kinds | {"scale": "fp32"} | dict.fromkeys(("T", "H", "L", "W", "visible_stride"), "i32"),
        {
            "LOW": 128, "HIGH": 64, "V": 128, "MASKED": masked,
            "BLOCK_M": config.block_rows, "BLOCK_N": config.block_keys,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=("T", "H"),
    )  # fmt: skip
    assert made.spilled == 0
    assert made.shared <= 227 * 1024
    assert made.wgmma > 0
    assert made.tma > 0


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("width", "value_width"), [(192, 128), (64, 32)])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (63, 64), (65, 65), (130, 513), (257, 2049)])
def test_on_gpu(num_rows: int, num_keys: int, width: int, value_width: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    q, k, v, visible = random_case(num_rows, num_keys, 3, width, value_width, generator)
    q, k, v = (tensor.bfloat16().cuda() for tensor in (q, k, v))
    selected = choose(visible, 256, generator).cuda() if masked else None
    out = expanded_mha(q, k, v, visible.cuda(), selected, SCALE, backend="triton")
    expected = exactly(q, k, v, visible, selected)
    assert (out.double() - expected).norm() / expected.norm() < 6e-3
