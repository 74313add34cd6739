from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels.fp8_gemm
import kernels.fp8_gemm_prefill
import kernels.fp8_tiles
import kernels.split_sum
from kernels.backend import UnsupportedKernel
from kernels.fp8_gemm import _config_for, _Decode, _launch, fp8_gemm
from kernels.fp8_gemm_prefill import Prefill
from kernels.split_sum import split_counters
from tests.kernels.compiled import Compiled, compile_for_hopper

# N x K of V3.2's matrices, and of the demo's
FULL_SIZE = [
    (2112, 7168),
    (24576, 1536),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
    (8192, 1536),
    (18432, 7168),
]
ROWS = [1, 4, 16, 32, 64, 128, 192, 256, 257, 4096]

MODULES = kernels.fp8_gemm, kernels.fp8_gemm_prefill, kernels.fp8_tiles, kernels.split_sum
PREFILL = Prefill(64, "none", warps=4, stages=2, tma=False, group=2)
DECODE = _Decode(64, 16, 2, warps=4, stages=2, tma=False)


def operands(
    num_rows: int, num_outputs: int, num_inputs: int, generator: torch.Generator, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values on the e4m3 grid; scales of rows are powers of two, transposed in memory."""
    blocks = num_inputs // 128
    x = (torch.randn(num_rows, num_inputs, generator=generator) * spread).to(torch.float8_e4m3fn)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(torch.float8_e4m3fn)
    exponents = torch.randint(-6, 3, (blocks, -(-num_rows // 4) * 4), generator=generator)
    x_scales = torch.exp2(exponents.float()).t()[:num_rows]
    weight_scales = torch.rand(-(-num_outputs // 128), blocks, generator=generator) + 0.1
    return x, x_scales, weight, weight_scales


def product(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """In float64, scaled number by number."""
    rows = x.double() * x_scales.double().repeat_interleave(128, 1)
    scales = weight_scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return rows @ (weight.double() * scales[: weight.shape[0]]).t()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def on_cpu(interpreted: Callable[..., None]) -> None:
    interpreted(*MODULES)


@pytest.mark.parametrize(("num_rows", "num_outputs"), [(1, 64), (5, 192), (16, 130)])
def test_reference_is_the_product_of_dequantised_operands(
    num_rows: int, num_outputs: int, generator: torch.Generator
) -> None:
    given = operands(num_rows, num_outputs, 256, generator)
    found = fp8_gemm(*given, out_dtype=torch.float32, backend="reference")
    assert relative_error(found, product(*given)) < 1e-6
    assert fp8_gemm(*given, backend="reference").dtype == torch.bfloat16


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("two", ["none", "tokens", "outputs"])
def test_prefill_interpreted(two: str, tma: bool, generator: torch.Generator) -> None:
    given = operands(150, 330, 256, generator)
    found = _launch(*given, torch.float32, PREFILL._replace(two=two, tma=tma))
    assert relative_error(found, product(*given)) < 1e-6


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("num_rows", "splits"), [(1, 1), (17, 1), (17, 3), (33, 2)])
def test_decode_interpreted(num_rows: int, splits: int, tma: bool, generator: torch.Generator) -> None:
    given = operands(num_rows, 130, 512, generator)
    for _ in range(2):  # the second finds the counters as the first left them
        found = _launch(*given, torch.float32, DECODE._replace(splits=splits, tma=tma))
        assert relative_error(found, product(*given)) < 1e-6
    assert not split_counters(given[0].device).any()


@pytest.mark.usefixtures("on_cpu")
def test_scales_by_rows_and_more_splits_than_blocks(generator: torch.Generator) -> None:
    x, x_scales, weight, weight_scales = operands(3, 64, 256, generator)
    found = _launch(x, x_scales.contiguous(), weight, weight_scales, torch.float32, DECODE._replace(splits=4))
    assert relative_error(found, product(x, x_scales, weight, weight_scales)) < 1e-6


@pytest.mark.parametrize(("num_rows", "num_outputs"), [(0, 64), (3, 0), (300, 0)])
def test_nothing(num_rows: int, num_outputs: int, generator: torch.Generator) -> None:
    given = operands(num_rows, num_outputs, 128, generator)
    assert fp8_gemm(*given, backend="triton").shape == (num_rows, num_outputs)
    assert _launch(*given, torch.bfloat16, DECODE).shape == (num_rows, num_outputs)
    if num_outputs:
        assert fp8_gemm(*given, backend="reference").shape == (0, num_outputs)


def test_refusals(generator: torch.Generator) -> None:
    x, x_scales, weight, weight_scales = operands(2, 64, 256, generator)
    with pytest.raises(UnsupportedKernel, match=r"^fp8_gemm: .* is not e4m3 by e4m3$"):
        fp8_gemm(x.float(), x_scales, weight, weight_scales, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"^fp8_gemm: .* a multiple of 128$"):
        fp8_gemm(x[:, :192], x_scales, weight[:, :192], weight_scales, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"^fp8_gemm: scales "):
        fp8_gemm(x, x_scales[:, :1], weight, weight_scales, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"^fp8_gemm: scales are .*, not float32$"):
        fp8_gemm(x, x_scales.bfloat16(), weight, weight_scales, backend="triton")
    shifted = torch.zeros(2 * 256 + 8, dtype=x.dtype)[8:].view(2, 256)
    with pytest.raises(UnsupportedKernel, match=r"^fp8_gemm: x must begin at a multiple of 16 bytes$"):
        fp8_gemm(shifted, x_scales, weight, weight_scales, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"contiguous$"):
        fp8_gemm(x[::2], x_scales[::2], weight.t().contiguous().t(), weight_scales, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"^fp8_gemm: has no 'deterministic'"):
        fp8_gemm(x, x_scales, weight, weight_scales, backend="deterministic")


def compiled(config: _Decode | Prefill) -> Compiled:
    common = {"x_scales": "*fp32", "weight_scales": "*fp32", "out": "*bf16", "x_scale_stride_k": "i32"}
    sizes = {"T": "i32", "N": "i32", "K": "i32"}
    rows, outputs = config.tokens, config.outputs if isinstance(config, _Decode) else 128
    matrices = {"x": "*fp8e4nv", "weight": "*fp8e4nv"}
    if config.tma:
        matrices = {
            "x": f"tensordesc<fp8e4nv[{rows}, 128]>",
            "weight": f"tensordesc<fp8e4nv[{outputs}, 128]>",
        }
    options = {"num_warps": config.warps, "aligned": ("N", "K")}
    if isinstance(config, _Decode):
        shape = {"BN": outputs, "BT": rows, "SPLITS": config.splits, "TMA": config.tma}
        shape["STAGES"] = config.stages
        return compile_for_hopper(
            kernels.fp8_gemm._decode_kernel,
            {**common, **sizes, **matrices, "parts": "*fp32", "counters": "*i32"},
            {**shape, "x_scale_stride_t": 1},
            **options,
        )
    return compile_for_hopper(
        kernels.fp8_gemm_prefill._prefill_kernel,
        {**common, **sizes, **matrices},
        {
            "BT": rows,
            "TWO_X": config.two == "tokens",
            "TWO_W": config.two == "outputs",
            "TMA": config.tma,
            "GROUP": config.group,
            "STAGES": config.stages,
            "x_scale_stride_t": 1,
        },
        **options,
    )


CONFIGS = sorted({_config_for(rows, *shape, 132) for rows in ROWS for shape in FULL_SIZE}, key=str)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compiles_for_hopper(config: _Decode | Prefill) -> None:
    made = compiled(config)
    assert made.spilled == 0
    assert made.wgmma > 0
    assert made.mma_sync == 0
    assert made.tma > 0 if config.tma else made.cp_async > 0
    assert made.shared <= 227 * 1024


def on_gpu(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, x_scales, weight, weight_scales = given
    return x.cuda(), x_scales.t().contiguous().cuda().t(), weight.cuda(), weight_scales.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [FULL_SIZE[0], FULL_SIZE[4], (320, 256), (256, 128), (1536, 256), (64, 128)]
)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 16, 63, 64, 65, 128, 255, 256, 257, 300, 2047, 2049])
def test_against_float64(num_rows: int, shape: tuple[int, int], generator: torch.Generator) -> None:
    given = on_gpu(operands(num_rows, *shape, generator))
    found = fp8_gemm(*given, backend="triton")
    assert found.shape == (num_rows, shape[0])
    if num_rows:
        assert relative_error(found, product(*given)) < 2.5e-3  # rounding to bf16 alone is 1.7e-3


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 64, 1024])
@pytest.mark.parametrize("spread", [1e-2, 50.0])
def test_of_small_and_of_large_values(num_rows: int, spread: float, generator: torch.Generator) -> None:
    given = on_gpu(operands(num_rows, 2112, 7168, generator, spread))
    found = fp8_gemm(*given, out_dtype=torch.float32, backend="triton")
    assert relative_error(found, product(*given)) < 1e-3


@pytest.mark.gpu
def test_same_bits_every_time_and_in_a_graph(generator: torch.Generator) -> None:
    given = on_gpu(operands(64, 2112, 7168, generator))
    first = fp8_gemm(*given, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp8_gemm(*given, backend="triton")
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured.view(torch.int16), first.view(torch.int16))
    assert not split_counters(first.device).any()


def test_configurations_fit_their_shapes() -> None:
    for rows in ROWS:
        for outputs, inputs in [*FULL_SIZE, (320, 256), (64, 128)]:
            config = _config_for(rows, outputs, inputs, 132)
            if isinstance(config, _Decode):
                assert 1 <= config.splits <= inputs // 128
                assert np.log2(config.tokens) == int(np.log2(config.tokens))
