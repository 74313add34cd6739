import pytest
import torch
from triton.experimental.gluon import language as gl

import kernels.expanded_mha_gluon as module
from tests.kernels.compiled import compile_for_hopper


def described(rows: int, channels: int) -> str:
    layout = gl.NVMMASharedLayout.get_default_for([rows, channels], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {channels}],{layout!r}>"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widths", [(128, 64, 128), (32, 16, 32)])
def test_compiled_for_hopper(widths: tuple[int, int, int], masked: bool) -> None:
    nope, rope, value = widths
    kinds = {
        "q_nope": described(module._ROWS, nope),
        "q_pe": described(module._ROWS, rope),
        "k_nope": described(module._KEYS, nope),
        "k_pe": described(module._KEYS, rope),
        "v": described(module._KEYS, value),
        "visible": "*i64",
        "mask": "*i32",
        "out": "*bf16",
        "counter": "*i32",
        "scale": "fp32",
    }
    heads = ("q_nope_head", "q_pe_head", "k_nope_head", "v_head")
    integers = ("T", "H", "L", "K", "pieces", *heads, "visible_stride", "mask_stride")
    compiled = compile_for_hopper(
        module._attend,
        kinds | dict.fromkeys(integers, "i32"),
        {
            "N": nope, "R": rope, "V": value, "KEYS": module._KEYS, "STAGES": module._STAGES,
            "HEADS": module._HEADS, "MASKED": masked,
        },
        num_warps=4,
        aligned=("H", *heads),
    )  # fmt: skip
    assert compiled.spilled == 0
    # Scores in three places, of the first tile and of tiles with and without hidden keys; the sum in as many.
    assert compiled.wgmma == 2 * 3 * ((nope + rope) // 16 + module._KEYS // 16)
    assert compiled.tma >= 7
    assert "setmaxnreg" in compiled.ptx
    assert compiled.ptx.count("ex2.approx") >= 2 * 3 * module._KEYS // 2


def test_heads_as_a_matrix() -> None:
    wide = torch.arange(3 * 5 * 12).view(3, 60)
    heads = wide.unflatten(1, (5, 12))[..., 4:8]
    matrix = module.by_head(heads)
    for head in range(5):
        assert torch.equal(matrix[:, 12 * head : 12 * head + 4], heads[:, head])
