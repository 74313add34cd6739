from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.bf16_gemm
import kernels.split_sum
from kernels.backend import UnsupportedKernel
from kernels.bf16_gemm import _Config, _config_for, _launch, bf16_gemm, per_head_gemm
from kernels.split_sum import split_counters
from tests.kernels.compiled import compile_for_hopper

CONFIG = _Config(64, 16, 32, 1, warps=4, stages=2)
FULL_SIZE = [(1, 256, 7168), (1, 64, 7168), (128, 512, 128), (128, 128, 512)]  # H, N, K
DEMO = [(1, 32, 256), (1, 8, 256), (8, 128, 32), (8, 32, 128)]
ROWS = [1, 16, 32, 64, 128, 256, 4096]


@pytest.fixture
def on_cpu(interpreted: Callable[..., None]) -> None:
    interpreted(kernels.bf16_gemm, kernels.split_sum)


def operands(num_rows: int, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    num_heads, num_outputs, num_inputs = shape
    x = torch.randn(num_rows, num_heads, num_inputs, generator=generator).bfloat16()
    return x, torch.randn(num_heads, num_outputs, num_inputs, generator=generator).bfloat16()


def product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("thk,hnk->thn", x.double(), weight.double())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_references(generator: torch.Generator) -> None:
    x, weight = operands(5, (3, 24, 40), generator)
    found = per_head_gemm(x, weight, backend="reference")
    assert found.dtype == torch.bfloat16
    assert relative_error(found, product(x, weight)) < 2.5e-3
    found = bf16_gemm(x[:, 0], weight[0], backend="reference")
    assert relative_error(found, product(x[:, :1], weight[:1])[:, 0]) < 1e-6


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", [(1, 70, 160), (1, 8, 256), (3, 65, 40), (2, 128, 32)])
def test_interpreted(shape: tuple[int, int, int], splits: int, generator: torch.Generator) -> None:
    x, weight = operands(19, shape, generator)
    for _ in range(2):  # the second finds the counters as the first left them
        out = torch.empty(19, *shape[:2])
        _launch(x, weight, out, CONFIG._replace(splits=splits))
        assert relative_error(out, product(x, weight)) < 1e-6
    assert not split_counters(x.device).any()


@pytest.mark.usefixtures("on_cpu")
def test_any_strides(generator: torch.Generator) -> None:
    x, weight = operands(6, (2, 64, 32), generator)
    out = torch.empty(6, 2, 64)
    turned = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    _launch(turned, weight, out, CONFIG)
    assert relative_error(out, product(x, weight)) < 1e-6


def test_nothing_and_refusals(generator: torch.Generator) -> None:
    x, weight = operands(0, (2, 64, 32), generator)
    assert per_head_gemm(x, weight, backend="reference").shape == (0, 2, 64)
    with pytest.raises(UnsupportedKernel, match=r"^per_head_gemm: .* is not bf16 by bf16$"):
        per_head_gemm(x.float(), weight, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"^bf16_gemm: .* does not fit weight"):
        bf16_gemm(x[:, 0, :16], weight[0], backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"^bf16_gemm: weight must be contiguous$"):
        bf16_gemm(x[:, 0], weight[0].t().contiguous().t(), backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"^bf16_gemm: has no 'deterministic'"):
        bf16_gemm(x[:, 0], weight[0], backend="deterministic")


CASES = sorted({(_config_for(rows, *shape, 132), shape[0] > 1) for rows in ROWS for shape in FULL_SIZE})


@pytest.mark.parametrize(("config", "heads"), CASES, ids=str)
def test_compiles_for_hopper(config: _Config, heads: bool) -> None:
    strides = ("x_stride_t", "x_stride_h", "out_stride_t", "out_stride_h")
    made = compile_for_hopper(
        kernels.bf16_gemm._gemm_kernel,
        {"x": "*bf16", "weight": "*bf16", "out": "*bf16" if heads else "*fp32", "parts": "*fp32"}
        | {"counters": "*i32", "T": "i32", "N": "i32", "K": "i32"}
        | dict.fromkeys(strides, "i32"),
        {"BN": config.outputs, "BT": config.tokens, "BK": config.inputs, "SPLITS": config.splits}
        | {"RAGGED": False, "UPCAST": False, "x_stride_k": 1},
        num_warps=config.warps,
        num_stages=config.stages,
        aligned=("N", "K", *strides),
    )
    assert made.spilled == 0
    assert made.wgmma > 0
    assert made.mma_sync == 0
    assert made.cp_async > 0
    assert made.shared <= 227 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*FULL_SIZE, *DEMO], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 16, 63, 64, 65, 128, 256, 257, 2049])
def test_against_float64(num_rows: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
    x, weight = (tensor.cuda() for tensor in operands(num_rows, shape, generator))
    if shape[0] == 1:
        found, bound = bf16_gemm(x[:, 0], weight[0], backend="triton").unsqueeze(1), 2e-5
    else:
        # As the decoder has it: a part of wider rows.
        wide = torch.cat([x, x], dim=-1)[..., : shape[2]]
        found, bound = per_head_gemm(wide, weight, backend="triton"), 2.5e-3
    assert found.shape == (num_rows, *shape[:2])
    if num_rows:
        assert relative_error(found, product(x, weight)) < bound


@pytest.mark.gpu
def test_same_bits_every_time_and_in_a_graph(generator: torch.Generator) -> None:
    x, weight = (tensor[:, 0].cuda() for tensor in operands(64, (1, 64, 7168), generator))
    weight = operands(1, (1, 256, 7168), generator)[1][0].cuda()
    first = bf16_gemm(x, weight, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bf16_gemm(x, weight, backend="triton")
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, first)
