"""Tokens of the kernels: those of `model/sampling.py` wherever a row counts as settled, and nearly all do."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import triton.language.random
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import kernels.draw
from kernels.backend import UnsupportedKernel
from kernels.draw import DrawParams, draw_tokens
from model import noise
from model.sampling import Drawing, NonFiniteLogits, SampleRow, sample
from tests.kernels.compiled import compile_for_hopper
from tests.model.sampling_reference import make_row
from tests.model.test_sampling import FULL_VOCAB, batches

INF = math.inf
# What a GPU takes in its stride, numpy warns of.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:invalid value encountered", "ignore:All-NaN slice"
)
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_k": 40},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.3},
    {"temperature": 1e-4},
    {"top_p": 0.0},
    {"min_p": 1.0},
    {"top_k": 600},
    {"top_p": 0.999},
]


@pytest.fixture
def on_cpu(interpreted: Callable[..., None]) -> None:
    interpreted(kernels.draw, triton.language.random)


def mixed_rows(num_rows: int) -> list[SampleRow]:
    """Of all kinds, at places all over the generator's range."""
    return [
        make_row(i * 7919 % 2**32, seed=(i + 1) * 2**56 + i, choice=i % 5, **KINDS[i % len(KINDS)])
        for i in range(num_rows)
    ]


def logits_of(kind: str, num_rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    x = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    match kind:
        case "ties":
            return (x * 2).round() / 2
        case "equal":
            return torch.zeros_like(x)
        case "signs of zero":
            return torch.where(x > 4, x, 0.0) * x.sign()
        case "masked":
            return torch.where(torch.rand(x.shape, generator=generator) < 0.9, -INF, x).index_fill(
                1, torch.tensor([2]), 1.0
            )
        case "sorted":
            return x.sort(-1, descending=True).values
        case "peaked":
            return x * 5
    return x


def triton_tokens(logits: Tensor, rows: list[SampleRow]) -> tuple[list[int], list[int]]:
    """Tokens, and those of them that were settled in the first place."""
    drawing = Drawing(logits, rows, backend="triton")
    _, unsettled = drawing._copy.wait().tolist()
    return drawing.read().tokens, [i for i, is_open in enumerate(unsettled) if not is_open]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("kind", "vocab_size"),
    [("equal", 3), ("plain", 2048), ("peaked", 2500)]
    + [(kind, 2500) for kind in ("ties", "equal", "signs of zero", "masked", "sorted")],
)
def test_interpreted(kind: str, vocab_size: int, generator: torch.Generator) -> None:
    logits, rows = logits_of(kind, 11, vocab_size, generator), mixed_rows(11)
    tokens, settled = triton_tokens(logits, rows)
    assert tokens == sample(logits, rows).tokens
    guesses = Drawing(logits, rows, backend="triton").tokens.tolist()
    assert [guesses[i] for i in settled] == [tokens[i] for i in settled]
    greedy = {i for i, row in enumerate(rows) if row.params.is_greedy}
    assert greedy <= set(settled)
    if kind in ("plain", "peaked"):
        assert len(settled) >= 9, "the host is rarely asked"


@pytest.mark.usefixtures("on_cpu")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches())
def test_every_parameter_at_once(batch: tuple[list[list[float]], list[SampleRow]]) -> None:
    logits, rows = batch
    assert triton_tokens(torch.tensor(logits), rows)[0] == sample(torch.tensor(logits), rows).tokens


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 2}], ids=str)
@pytest.mark.parametrize("bad", [[0.0, math.nan, 1.0], [0.0, INF, 1.0], [-INF] * 3], ids=str)
def test_non_finite_logits_name_their_rows(bad: list[float], params: dict[str, Any]) -> None:
    rows = [make_row(i, **params) for i in range(4)]
    drawing = Drawing(torch.tensor([[0.0, -INF, 1.0], bad] * 2), rows, backend="triton")
    assert drawing.tokens[[1, 3]].tolist() == [-1, -1]
    with pytest.raises(NonFiniteLogits) as caught:
        drawing.read()
    assert caught.value.rows == (1, 3)


@triton.jit
def _noise(table, out, N: tl.constexpr, PTX: tl.constexpr):
    token = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + token, kernels.draw._gumbel(table, token, PTX))


def noise_error(device: str, num_places: int) -> float:
    """The largest error of the kernel's noise over vocabularies of full size."""
    worst = 0.0
    out = torch.empty(FULL_VOCAB, device=device)
    for place in range(num_places):
        row = DrawParams(1.0, 0, 1.0, 0.0, place * 2**60 - 5, place, 2**32 - 1 - place)
        table = kernels.draw._table([row], FULL_VOCAB, torch.device(device))
        _noise[(FULL_VOCAB // 256,)](table, out, N=256, PTX=device == "cuda")
        of_place = [torch.tensor([number]) for number in (row.seed, row.choice, row.position)]
        expected = noise.gumbel(*of_place, torch.arange(FULL_VOCAB))
        worst = max(worst, float((out.cpu().double() - expected).abs().max()))
    return worst


@pytest.mark.usefixtures("on_cpu")
def test_noise_is_as_near_as_the_kernel_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setitem(globals(), "_noise", InterpretedFunction(_noise.fn))
    assert noise_error("cpu", 1) < 1e-5


def test_refusals() -> None:
    rows = [DrawParams(1.0, 0, 1.0, 0.0, 0, 0, 0)]
    with pytest.raises(UnsupportedKernel, match=r"^draw_tokens: logits are torch.float64"):
        draw_tokens(torch.zeros(1, 3, dtype=torch.float64), rows)
    with pytest.raises(UnsupportedKernel, match=r"^draw_tokens: the logits of a row must be contiguous$"):
        draw_tokens(torch.zeros(3, 2).t(), rows)
    with pytest.raises(UnsupportedKernel, match=r"^draw_tokens: 1 params for 2 rows$"):
        draw_tokens(torch.zeros(2, 3), rows)
    assert draw_tokens(torch.zeros(0, 3), []).shape == (2, 0)


TILE = {"TILE": 2048, "GROUP": 64}
GREEDY, WHOLE, CUT = (
    {"SAMPLED": s, "CUT": c, "PTX": True} for s, c in ((False, False), (True, False), (True, True))
)
TYPES = dict.fromkeys(("stride", "V", "num_groups", "num_tiles", "num_rows"), "i32") | {
    "logits": "*fp32", "table": "*i64", "tile_floats": "*fp32", "tile_tokens": "*i32", "groups": "*fp32",
    "row_bests": "*fp32", "row_ints": "*i32", "values": "*fp32", "ids": "*i32", "out": "*i64",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "constants", "warps", "registers"),
    [
        ("_look", TILE | GREEDY, 8, 32),
        ("_look", TILE | WHOLE, 8, 48),
        ("_look", TILE | CUT, 8, 48),
        ("_bound", {"G": 2048}, 8, 64),
        ("_gather", TILE | {"C": 2048}, 8, 40),
        ("_settle", {"P": 64, "C": 2048} | GREEDY, 4, 32),
        ("_settle", {"P": 64, "C": 2048} | CUT, 8, 128),
    ],
    ids=str,
)
def test_compiles_for_hopper(name: str, constants: dict[str, Any], warps: int, registers: int) -> None:
    kernel = getattr(kernels.draw, name)
    arguments = {argument: TYPES[argument] for argument in kernel.arg_names if argument in TYPES}
    made = compile_for_hopper(kernel, arguments, constants, num_warps=warps)
    assert made.spilled == 0
    assert made.registers <= registers


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [3, 5000, FULL_VOCAB])
@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "masked", "sorted", "peaked"])
def test_on_a_gpu(kind: str, vocab_size: int, generator: torch.Generator) -> None:
    logits, rows = logits_of(kind, 66, vocab_size, generator), mixed_rows(66)
    tokens, settled = triton_tokens(logits.cuda(), rows)
    assert tokens == sample(logits, rows).tokens
    if kind in ("plain", "peaked"):
        assert len(settled) >= 55, "all but nuclei of thousands"


@pytest.mark.gpu
def test_noise_on_a_gpu() -> None:
    assert noise_error("cuda", 4) < 1.5e-5


@pytest.mark.gpu
def test_a_row_draws_alike_alone_and_among_others(generator: torch.Generator) -> None:
    logits, rows = 3 * torch.randn(33, FULL_VOCAB, generator=generator).cuda(), mixed_rows(33)
    together = triton_tokens(logits, rows)[0]
    moved = [replace(row) for row in rows[::-1]]
    assert triton_tokens(logits.flip(0), moved)[0] == together[::-1]
    assert [triton_tokens(logits[i : i + 1], rows[i : i + 1])[0][0] for i in range(33)] == together
