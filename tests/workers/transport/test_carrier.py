import sys
import time

import pytest
import torch

from kernels.mailbox import TIMED_OUT
from workers.transport import cuda_memory
from workers.transport.carrier import (
    Carrier,
    CarrierFailed,
    CarrierUnavailable,
    Failure,
    Parcel,
    await_step,
)
from workers.transport.cuda_memory import shared_zeros
from workers.transport.nccl_carrier import unique_id, within
from workers.transport.protocol import Deadline, DeadlineExceeded
from workers.transport.slots import SlotPlan


def test_parcel() -> None:
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    parcel = Parcel((((3, 100), fp8), ((3, 1), torch.float32), ((0, 8), torch.int32), ((5,), bf16)))
    assert parcel.offsets == (0, 384, 512, 512, 640)
    assert (parcel.num_bytes, parcel.end) == (640, 522)
    memory = torch.arange(640, dtype=torch.int64).to(torch.uint8)
    views = parcel.views(memory)
    assert Parcel.of(views) == parcel
    assert [views[i].data_ptr() - memory.data_ptr() for i in (0, 1, 3)] == [0, 384, 512]
    assert parcel.laid_out_at(views) == memory.data_ptr()
    assert parcel.laid_out_at([*views[:3], views[3].clone()]) is None
    single = torch.ones(3)
    assert Parcel.of([single]).laid_out_at([single]) == single.data_ptr()
    turned = torch.ones(3, 2).t()
    assert Parcel.of([turned]).laid_out_at([turned]) is None
    assert (Parcel(()).num_bytes, Parcel(()).end, Parcel(()).laid_out_at([])) == (0, 0, None)


def test_slots_and_their_flags_lie_apart() -> None:
    plan = SlotPlan(3, 1000)
    memory = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    for slot in range(4):
        plan.slot(memory, slot).add_(1)
        plan.flags(memory, slot).view(torch.uint8).add_(1)
        assert plan.slot_offset(slot) % 128 == plan.flags_offset(slot) % 128 == 0
    assert int(memory.max()) == 1
    assert int(memory.sum()) == 3 * 1000 + 512 + 4 * 512  # slots, the greeting's, flags
    plan.check(2, 1000)
    for slot, size in ((2, 1001), (3, 513), (4, 1), (-1, 1)):
        with pytest.raises(ValueError, match=f"slot {slot} of 3"):
            plan.check(slot, size)
    with pytest.raises(ValueError, match="hold nothing"):
        SlotPlan(0, 1)


def test_reasons_are_those_of_the_kernel() -> None:
    assert TIMED_OUT.value == Failure.TIMEOUT


class _Event:
    """Done after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


class _Failing:
    """The part of a carrier that a waiting host sees."""

    peer, epoch, reason = "b", 1, ""

    def check(self) -> None:
        if self.reason:
            raise CarrierFailed(self.peer, self.reason)

    def abort(self, reason: str) -> None:
        self.reason = reason


def _await(event: _Event, carrier: _Failing, seconds: float) -> None:
    carriers: list[Carrier] = [carrier]  # type: ignore[list-item]
    await_step(event, carriers, Deadline.after(seconds))  # type: ignore[arg-type]


def test_await_step() -> None:
    _await(_Event(5), _Failing(), 60)
    carrier = _Failing()
    with pytest.raises(CarrierFailed, match="carrier to b: the step did not end in time"):
        _await(_Event(10**9), carrier, 0.01)
    for looks in (0, 10**9):  # a failure counts also when the step has ended: it ended for that reason
        began = time.monotonic()
        with pytest.raises(CarrierFailed, match="in time"):
            _await(_Event(looks), carrier, 60)
        assert time.monotonic() - began < 30


def test_within() -> None:
    assert within(Deadline.after(60), "adding", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        within(Deadline.after(60), "dividing", lambda: 1 // 0)
    with pytest.raises(DeadlineExceeded, match="deadline exceeded: sleeping"):
        within(Deadline.after(0.01), "sleeping", lambda: time.sleep(1))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", None)
    with pytest.raises(
        CarrierUnavailable, match=r"CuPy with NCCL is missing: pip install 'eightfold\[gpu\]'"
    ):
        unique_id()
    monkeypatch.setattr(cuda_memory, "_driver", cuda_memory._driver.__wrapped__)
    monkeypatch.setattr(cuda_memory.ctypes, "CDLL", no_driver)
    with pytest.raises(CarrierUnavailable, match="CUDA's driver is missing"):
        shared_zeros((1,), torch.uint8, torch.device("cuda", 0))
