from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kernels.expanded_mha as module
from kernels.backend import UnsupportedKernel
from kernels.expanded_mha import expanded_mha
from kernels.latent_tiles import TileConfig
from tests.kernels.compiled import compile_for_hopper

SCALE = 0.12
PORTABLE = TileConfig(128, 64, 8, 3)


class Heads(NamedTuple):
    """q_nope [T, H, N], q_pe [T, H, R], k_nope [L, H, N], k_pe [L, R] and v [L, H, V] as projections leave
    them: views of wider rows."""

    q_nope: Tensor
    q_pe: Tensor
    k_nope: Tensor
    k_pe: Tensor
    v: Tensor

    def to(self, *args: object) -> "Heads":
        """What they are views of moves, so strides stay."""
        return Heads(*(_moved(tensor, *args) for tensor in self))


def _moved(view: Tensor, *args: object) -> Tensor:
    assert view._base is not None
    return view._base.to(*args).as_strided(view.shape, view.stride(), view.storage_offset())  # type: ignore[call-overload, no-any-return]


def exactly(heads: Heads, visible: Tensor, selected: Tensor | None) -> Tensor:
    """Float64; a mask made row by row."""
    q_nope, q_pe, k_nope, k_pe, v = (tensor.double() for tensor in heads)
    seen = torch.zeros(len(q_nope), len(k_pe), dtype=torch.bool, device=v.device)
    for t in range(len(q_nope)):
        chosen = slice(0, int(visible[t])) if selected is None else selected[t][selected[t] >= 0].long()
        seen[t, chosen] = True
    scores = torch.einsum("thd,lhd->htl", q_nope, k_nope) + torch.einsum("thd,ld->htl", q_pe, k_pe)
    weights = (scores * SCALE).masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("htl,lhv->thv", weights, v)


def random_case(
    num_rows: int, num_keys: int, heads: int, widths: tuple[int, int, int], generator: torch.Generator
) -> tuple[Heads, Tensor]:
    """Operands and how much each query sees; widths: N, R, V."""
    nope, rope, value = widths
    projected = torch.randn(num_rows, heads * (nope + rope) + 64, generator=generator)
    absorbed = torch.randn(num_rows, heads, 2 * rope, generator=generator)
    expanded = torch.randn(num_keys, heads, nope + value, generator=generator)
    latents = torch.randn(num_keys, 32 + rope, generator=generator)
    q = projected[:, : heads * (nope + rope)].unflatten(1, (heads, -1))
    operands = Heads(
        q[..., :nope], absorbed[..., rope:], expanded[..., :nope], latents[:, 32:], expanded[..., nope:]
    )
    return operands, torch.arange(num_keys - num_rows + 1, num_keys + 1)


def choose(visible: Tensor, k: int, generator: torch.Generator) -> Tensor:
    selected = torch.full((len(visible), k), -1, dtype=torch.int32)
    for t, count in enumerate(visible.tolist()):
        chosen = torch.randperm(count, generator=generator)[:k].int()
        selected[t, : len(chosen)] = chosen if t % 2 else chosen.sort().values
    return selected


@pytest.mark.parametrize("widths", [(32, 32, 32), (32, 16, 64)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (17, 33), (40, 40), (20, 100)])
def test_kernel_interpreted(
    num_rows: int,
    num_keys: int,
    masked: bool,
    widths: tuple[int, int, int],
    interpreted: Callable[..., None],
    generator: torch.Generator,
) -> None:
    interpreted(module)
    heads, visible = random_case(num_rows, num_keys, 2, widths, generator)
    if num_rows > 10:
        visible[:2] = 0
    selected = choose(visible, 20, generator) if masked else None
    out = torch.full((num_rows, 2, widths[2]), float("nan"))
    free = int((visible <= 20).sum()) if masked else 0  # have no choice to make
    choices = None if selected is None else selected[free:]
    module._launch(*heads, visible, choices, out, SCALE, TileConfig(16, 32, 4, 1))
    expected = exactly(heads, visible, selected)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    if num_rows > 10:
        assert (out[:2] == 0).all()
    plain = torch.full_like(out, float("nan"))
    assert expanded_mha(*heads, visible, choices, SCALE, out=plain, backend="reference") is plain
    torch.testing.assert_close(plain.double(), expected, atol=1e-5, rtol=0)


def test_marks_of_choices(interpreted: Callable[..., None], generator: torch.Generator) -> None:
    interpreted(module)
    visible = torch.tensor([3, 20, 21, 300, 700])
    selected = choose(visible, 20, generator)
    selected[3, 1:4] = selected[3, 0]  # again and again
    selected[4, 5:] = -1
    mask = module._mask_of(selected, visible, 700)
    assert mask.shape == (5, 24)
    for row, chosen in zip(mask, selected, strict=True):
        marked = {
            32 * word + bit for word, bits in enumerate(row.tolist()) for bit in range(32) if bits >> bit & 1
        }
        assert marked in (set(), set(chosen[chosen >= 0].tolist()))
    assert (mask != 0).any(1).tolist() == [False, False, True, True, True]


def test_refusals(generator: torch.Generator) -> None:
    heads, visible = random_case(2, 2, 3, (64, 32, 32), generator)

    def run(heads: Heads, visible: Tensor, selected: Tensor | None, out: Tensor | None = None) -> Tensor:
        return expanded_mha(*heads, visible, selected, SCALE, out=out, backend="triton")

    with pytest.raises(UnsupportedKernel, match=r"keys \(2, 3, 64\) and \(2, 16\)"):
        run(heads._replace(k_pe=heads.k_pe[:, :16]), visible, None)
    with pytest.raises(UnsupportedKernel, match="q_nope must be bfloat16"):
        run(heads, visible, None)
    half = heads.to(torch.bfloat16)
    with pytest.raises(UnsupportedKernel, match="v: serves powers of two from 32 to 128 channels, not 24"):
        run(half._replace(v=half.v[..., :24]), visible, None)
    with pytest.raises(UnsupportedKernel, match="2 queries, 1 lengths"):
        run(half, visible[:1], None)
    chosen = torch.zeros(2, 6, dtype=torch.int32)
    with pytest.raises(UnsupportedKernel, match="choices of 3"):
        run(half, visible, torch.zeros(3, 6, dtype=torch.int32))
    with pytest.raises(UnsupportedKernel, match="rows of choices must be contiguous"):
        run(half, visible, chosen[:, ::2])
    with pytest.raises(UnsupportedKernel, match=r"out \(2, 3, 16\) of torch.bfloat16 does not fit"):
        run(half, visible, None, out=torch.empty(2, 3, 16, dtype=torch.bfloat16))
    shifted = torch.zeros(2, 40, dtype=torch.bfloat16)[:, 1:33]
    with pytest.raises(UnsupportedKernel, match="k_pe must begin at a multiple of 16 bytes"):
        run(half._replace(k_pe=shifted), visible, None)
    odd = torch.zeros(2, 33, dtype=torch.bfloat16)[:, :32]
    with pytest.raises(UnsupportedKernel, match=r"k_pe of strides \(33, 1\)"):
        run(half._replace(k_pe=odd), visible, None)


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_for_hopper(masked: bool) -> None:
    kinds = {"q_nope": "*bf16", "q_pe": "*bf16", "visible": "*i32", "mask": "*i32", "out": "*bf16"}
    n = PORTABLE.block_keys
    kinds |= {"k_nope": f"tensordesc<bf16[{n}, 128]>", "k_pe": f"tensordesc<bf16[{n}, 64]>"}
    kinds |= {"v": f"tensordesc<bf16[{n}, 128]>"}
    strides = ("q_nope_stride", "q_nope_head", "q_pe_stride", "q_pe_head", "k_nope_head", "v_head")
    integers = ("T", "H", "L", "K", "visible_stride", "W", *strides)
    made = compile_for_hopper(
        module._attend,
        kinds | {"scale": "fp32"} | dict.fromkeys(integers, "i32"),
        {
            "N": 128, "R": 64, "V": 128, "MASKED": masked,
            "BLOCK_M": PORTABLE.block_rows, "BLOCK_N": PORTABLE.block_keys,
        },
        num_warps=PORTABLE.num_warps,
        num_stages=PORTABLE.num_stages,
        aligned=("T", "H", *strides),
    )  # fmt: skip
    assert made.spilled == 0
    assert made.shared <= 227 * 1024
    assert made.wgmma > 0
    assert made.tma > 0


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, PORTABLE], ids=["hopper", "portable"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widths", [(128, 64, 128), (32, 32, 32)])
@pytest.mark.parametrize(
    ("num_rows", "num_keys"), [(1, 1), (63, 64), (65, 65), (130, 513), (257, 2049), (1500, 1500)]
)
def test_on_gpu(
    num_rows: int, num_keys: int, widths: tuple[int, int, int], masked: bool, config: TileConfig | None
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    heads, visible = random_case(num_rows, num_keys, 5, widths, generator)
    heads = heads.to("cuda", torch.bfloat16)
    selected = choose(visible, 256, generator).cuda() if masked else None
    choices = None if selected is None else selected[int((visible <= 256).sum()) // 2 :]
    out = torch.full((num_rows, 5, widths[2]), float("nan"), dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        module._launch(*heads, visible.cuda(), choices, out, SCALE, config)
        expected = exactly(heads, visible, selected)
        assert (out.double() - expected).norm() / expected.norm() < 6e-3
