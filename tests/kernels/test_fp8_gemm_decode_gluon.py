import re
from itertools import pairwise

import pytest
import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

import kernels.fp8_gemm_decode_gluon as module
from kernels.fp8_gemm_decode_gluon import (
    GluonDecode,
    decode_config,
    grouped_decode_config,
    launch_dense,
    launch_grouped,
)
from kernels.split_sum import split_counters
from tests.kernels.compiled import HOPPER, _resources

FULL_SIZE = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (8192, 1536)]
DEMO = [(320, 256), (256, 128), (1536, 256), (64, 128), (130, 384)]
ROWS = [33, 64, 65, 128, 129, 256]
DENSE = sorted({decode_config(rows, *shape, 132) for rows in ROWS for shape in [*FULL_SIZE, *DEMO]})
GROUPED = sorted({grouped_decode_config(rows) for rows in (17, 64, 65, 128)})


def test_configurations() -> None:
    assert decode_config(64, 2112, 7168, 132)[:4] == (64, 32, 1, 2)
    assert decode_config(128, 4096, 7168, 132) == (64, 64, 1, 1, 6, 1)
    assert decode_config(128, 24576, 1536, 132) == (64, 64, 1, 1, 3, 2)
    for config in (*DENSE, *GROUPED):
        assert config.stages >= 2
        assert config.residents == 1 or config.groups == 1


@pytest.mark.parametrize(
    ("config", "grouped", "gather"),
    [(c, False, False) for c in DENSE] + [(c, True, g) for c in GROUPED for g in (False, True)],
    ids=str,
)
def test_compiled_for_hopper(config: GluonDecode, grouped: bool, gather: bool) -> None:
    def described(rows: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, 128], gl.float8e4nv)
        return f"tensordesc<fp8e4nv[{rows}, 128],{layout!r}>"

    kernel = module._decode
    integers = dict.fromkeys(("T", "N", "K", "num_work", "scale_stride_k"), "i32")
    kinds = {
        "x": "*fp8e4nv" if gather else described(config.tokens),
        "weight": described(config.outputs),
        "x_scales": "*fp32",
        "weight_scales": "*fp32",
        "offsets": "*i32",
        "source_rows": "*i32",
        "out": "*bf16",
        "parts": "*fp32",
        "counters": "*i32",
        **integers,
    }
    constants = {
        "scale_stride_t": 1,
        "BT": config.tokens,
        "BN": config.outputs,
        "GROUPS": config.groups,
        "SPLITS": config.splits,
        "STAGES": config.stages,
        "KB": module._BLOCKS,
        "GROUPED": grouped,
        "GATHER": gather,
        "PRODUCERS": 4 if gather else 1,
    }
    divisible = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in kinds.items()
        if kind.startswith("*") or name in ("N", "K")
    }
    source = GluonASTSource(
        kernel,
        {name: kinds.get(name, "constexpr") for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        divisible,
    )
    options = {"num_warps": 4, "maxnreg": None if config.residents == 1 else 128}
    binary = triton.compile(source, target=HOPPER, options=options)
    assert binary.metadata.shared <= 227 * 1024 // config.residents - 1024
    assert _resources(binary.asm["cubin"])[1] == 0
    products = 4 * module._BLOCKS * config.groups * config.tokens // 64
    assert len(re.findall(r"wgmma\.mma_async", binary.asm["ptx"])) == products
    assert "cp.async.bulk.tensor" in binary.asm["ptx"]


def operands(t: int, n: int, k: int, experts: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    blocks = k // 128
    x = torch.randn(t, k, generator=generator).to(torch.float8_e4m3fn)
    exponents = torch.randint(-6, 3, (blocks, -(-t // 4) * 4), generator=generator)
    weights = torch.randn(experts, n, k, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(experts, -(-n // 128), blocks, generator=generator) + 0.1
    return x.cuda(), torch.exp2(exponents.float()).cuda().t()[:t], weights.cuda(), scales.cuda()


def product(x: torch.Tensor, xs: torch.Tensor, w: torch.Tensor, ws: torch.Tensor) -> torch.Tensor:
    rows = x.double() * xs.double().repeat_interleave(128, 1)
    scales = ws.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return rows @ (w.double() * scales[: w.shape[0]]).t()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [FULL_SIZE[0], FULL_SIZE[4], *DEMO])
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 33, 64, 65, 128, 200])
def test_dense(num_rows: int, splits: int, shape: tuple[int, int], generator: torch.Generator) -> None:
    x, xs, w, ws = operands(num_rows, *shape, 1, generator)
    config = GluonDecode(64, 64, 1, splits, 3, residents=2)  # more splits than blocks, too
    out = x.new_empty(num_rows, shape[0], dtype=torch.bfloat16)
    expected = product(x, xs, w[0], ws[0])
    for scales in (xs, xs.contiguous()):
        out.fill_(float("nan"))
        launch_dense(x, scales, w[0], ws[0], out, config, 132)
        assert (out.double() - expected).norm() / expected.norm() < 2.5e-3
    assert not split_counters(x.device).any()


@pytest.mark.gpu
@pytest.mark.parametrize("config", DENSE, ids=str)
def test_every_configuration(config: GluonDecode, generator: torch.Generator) -> None:
    x, xs, w, ws = operands(150, 2112, 7168, 1, generator)
    out = x.new_empty(150, 2112, dtype=torch.float32)
    launch_dense(x, xs, w[0], ws[0], out, config, 132)
    expected = product(x, xs, w[0], ws[0])
    assert (out.double() - expected).norm() / expected.norm() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("config", GROUPED, ids=str)
@pytest.mark.parametrize("gather", [False, True])
def test_grouped(gather: bool, config: GluonDecode, generator: torch.Generator) -> None:
    counts = torch.tensor([0, 3, 0, 129, 64, 1, 0, 300, 7])
    x, xs, w, ws = operands(int(counts.sum()), 320, 384, len(counts), generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    rows = torch.randperm(len(x), generator=generator).int().cuda() if gather else None
    out = x.new_empty(len(x), 320, dtype=torch.bfloat16).fill_(float("nan"))
    launch_grouped(x, xs, w, ws, offsets.cuda(), rows, out, config, 132)
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        picked = torch.arange(begin, end).cuda() if rows is None else rows[begin:end].long()
        wide = x.view(torch.uint8)[picked].view(torch.float8_e4m3fn)
        expected = product(wide, xs[picked], w[expert], ws[expert])
        assert (out[begin:end].double() - expected).norm() <= 2.5e-3 * expected.norm()
