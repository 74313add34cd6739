from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.device import is_hopper, num_sms, shared_bytes

# None that a machine has, so that what the patched functions say is not kept for another test.
GPU = torch.device("cuda", 77)


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    num_sms.cache_clear()
    is_hopper.cache_clear()


def test_without_a_gpu_the_interpreter_gets_the_configurations_of_an_h100() -> None:
    assert num_sms(torch.device("cpu")) == 132
    assert not is_hopper(torch.device("cpu"))


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(multi_processor_count=114)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert [num_sms(GPU), num_sms(GPU)] == [114, 114]
    assert asked == [GPU]


@pytest.mark.parametrize(
    ("cuda", "capability", "expected"),
    [("13.0", (9, 0), True), ("13.0", (10, 0), False), (None, (9, 4), False)],
)
def test_hopper_is_nvidias(
    cuda: str | None, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert is_hopper(GPU) == expected


def test_programs_that_share_a_processor_fit_it() -> None:
    for programs in (1, 2, 3):
        assert programs * (shared_bytes(programs) + 1024) <= 228 * 1024
    assert shared_bytes(1) <= 227 * 1024  # the most that one can have
