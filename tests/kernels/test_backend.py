import pytest
import torch

from kernels.backend import UnsupportedKernel, require, require_aligned, require_reference, require_torch


def test_a_broken_rule_names_the_operation() -> None:
    with pytest.raises(UnsupportedKernel, match=r"^topk: k must be positive, not 0$"):
        require(False, "topk", "k must be positive, not 0")


def test_a_kept_rule_is_silent() -> None:
    require(True, "topk", "k must be positive")
    require_reference("reference", "topk")
    require_torch("reference", "topk")
    require_torch("deterministic", "topk")


def test_what_is_fetched_by_16_bytes_begins_at_a_multiple_of_them() -> None:
    numbers = torch.zeros(32)
    require_aligned("fp8_gemm", x=numbers, weight=numbers[4:])
    with pytest.raises(UnsupportedKernel, match=r"^fp8_gemm: weight must begin at a multiple of 16 bytes$"):
        require_aligned("fp8_gemm", x=numbers, weight=numbers[1:])


def test_another_backend_is_refused_and_never_replaced() -> None:
    with pytest.raises(UnsupportedKernel, match=r"^topk: has no 'triton' implementation, only 'reference'$"):
        require_reference("triton", "topk")
    with pytest.raises(UnsupportedKernel, match=r"^dense_mla: has no 'deterministic' implementation"):
        require_reference("deterministic", "dense_mla")
    with pytest.raises(
        UnsupportedKernel, match=r"^topk: has no 'triton' implementation, only 'reference' and"
    ):
        require_torch("triton", "topk")


def test_refusals_are_value_errors() -> None:
    assert issubclass(UnsupportedKernel, ValueError)


def test_these_tests_run_with_poisoned_memory() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(3).new_empty(2, dtype=torch.bfloat16).isnan().all()
    assert torch.empty(3, dtype=torch.uint8).tolist() == [255] * 3
    assert torch.empty(2, dtype=torch.float8_e4m3fn).float().isnan().all()
