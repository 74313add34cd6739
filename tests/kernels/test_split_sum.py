import pytest
import torch

from kernels.backend import UnsupportedKernel
from kernels.split_sum import MAX_TILES, parts_of, split_counters

CPU = torch.device("cpu")


def test_counters_are_shared_and_zero() -> None:
    assert split_counters(CPU) is split_counters(CPU)
    assert split_counters(CPU).tolist() == [0] * MAX_TILES


def test_counters_are_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedKernel, match=r"^split_sum: launch once before a graph is captured"):
        split_counters(torch.device("cuda", 77))


def test_parts() -> None:
    assert parts_of(7, 1, 64, CPU, "bf16_gemm").shape == (0,)
    assert parts_of(7, 3, 64, CPU, "bf16_gemm").shape == (7, 3, 64)
    with pytest.raises(UnsupportedKernel, match=r"^bf16_gemm: .* more than 16384$"):
        parts_of(MAX_TILES + 1, 2, 64, CPU, "bf16_gemm")
