import time
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

import kernels.mailbox
from kernels.mailbox import (
    MAX_FLAGS,
    _announce,
    _send,
    _wait,
    num_flags,
    raise_flag,
    send_to_mailbox,
    wait_for_mailbox,
)
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.fused import GPU

EPOCH = 7
SECOND = 10**9


@triton.jit
def _plain_raise(flag, epoch):
    tl.store(flag, epoch)


@triton.jit
def _plain_look(words):
    return tl.load(words)


@pytest.fixture
def on_cpu(interpreted: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels through the interpreter, which knows no assembly."""
    interpreted(kernels.mailbox)
    monkeypatch.setattr(kernels.mailbox, "_raise", InterpretedFunction(_plain_raise.fn))
    monkeypatch.setattr(kernels.mailbox, "_look", InterpretedFunction(_plain_look.fn))
    monkeypatch.setattr(kernels.mailbox, "_acquire", lambda: None)
    monkeypatch.setattr(kernels.mailbox, "globaltimer", time.monotonic_ns)


def padded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random bytes in memory that goes on behind them, as that of a GPU does."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.zeros(size + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    part = memory[start : start + size]
    part.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator))
    return part.to(device).view(dtype).view(shape)


MESSAGES: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {
    "one token": [
        ((1, 7168), torch.uint8),
        ((1, 56), torch.float32),
        ((1, 8), torch.int64),
        ((1, 8), torch.int32),
    ],
    "tails": [((3, 5), torch.uint8), ((0,), torch.int32), ((7,), torch.bfloat16), ((33, 3), torch.int8)],
    "many programs": [((9, 7168), torch.bfloat16), ((9, 3), torch.int32)],
    "nothing": [],
}


def check_send(name: str, device: torch.device) -> None:
    tensors = [padded(shape, dtype, device) for shape, dtype in MESSAGES[name]]
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.nbytes // 128) * 128)
    slot = torch.full((offsets[-1] + 256,), 0xEE, dtype=torch.uint8, device=device)
    flags = torch.zeros(MAX_FLAGS, dtype=torch.int32, device=device)
    failed = torch.zeros(1, dtype=torch.int32, device=device)
    count = num_flags(offsets[-1])
    send_to_mailbox(tensors, offsets[:-1], slot.data_ptr(), flags.data_ptr(), count, failed, EPOCH)
    for tensor, offset in zip(tensors, offsets, strict=False):
        found = slot[offset : offset + tensor.nbytes]
        assert torch.equal(found, tensor.reshape(-1).view(torch.uint8))
        end = -(-(offset + tensor.nbytes) // 16) * 16  # of the last unit; the next tensor comes later
        assert (slot[end : max(end, -(-end // 128) * 128)] == 0xEE).all()
    assert flags.tolist() == [EPOCH] * count + [0] * (MAX_FLAGS - count)
    failed.fill_(1)
    flags.zero_()
    send_to_mailbox(tensors, offsets[:-1], slot.data_ptr(), flags.data_ptr(), count, failed, EPOCH)
    raise_flag(flags.data_ptr(), failed, EPOCH)
    assert not flags.any()  # who has failed announces nothing
    failed.zero_()
    raise_flag(flags.data_ptr(), failed, EPOCH)
    assert flags.tolist() == [EPOCH] + [0] * (MAX_FLAGS - 1)


def check_wait(device: torch.device) -> None:
    flags, failed, words = (torch.zeros(n, dtype=torch.int32, device=device) for n in (MAX_FLAGS, 1, 2))
    words = words.cpu().pin_memory() if device.type == "cuda" else words

    def wait(raised: list[int], seconds: float) -> tuple[list[int], int, int]:
        flags.zero_()
        flags[: len(raised)] = torch.tensor(raised, device=device)
        wait_for_mailbox(flags, len(raised), failed, words, int(seconds * SECOND), EPOCH)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return flags[: len(raised)].tolist(), int(failed), int(words[1])

    assert wait([EPOCH] * 5, 60) == ([0] * 5, 0, 0)
    assert wait([EPOCH] * MAX_FLAGS, 60) == ([0] * MAX_FLAGS, 0, 0)
    began = time.monotonic()
    late = [EPOCH, EPOCH - 1, EPOCH]  # one program's flag is that of an older pairing
    assert wait(late, 0.05) == (late, 2, 2)
    assert time.monotonic() - began >= 0.05
    assert wait(late, 60) == (late, 2, 2)  # at once: a failure is noted
    failed.zero_()
    words[0], words[1] = 1, 0
    assert wait(late, 60) == (late, 1, 1)  # the host has said so
    assert wait([EPOCH], 60) == ([0], 1, 1)


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.usefixtures("on_cpu")
def test_send_interpreted(name: str) -> None:
    check_send(name, torch.device("cpu"))


@pytest.mark.usefixtures("on_cpu")
def test_wait_interpreted() -> None:
    check_wait(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MESSAGES)
def test_send(name: str) -> None:
    check_send(name, GPU)


@pytest.mark.gpu
def test_wait() -> None:
    check_wait(GPU)


def test_flags_of_a_message() -> None:
    assert [num_flags(size) for size in (0, 1, 8192, 8193, 64 * 14336, 2**30)] == [1, 1, 1, 2, 112, 128]


def test_refusals() -> None:
    failed, tensor = torch.zeros(1, dtype=torch.int32), torch.zeros(4, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="5 tensors"):
        send_to_mailbox([tensor] * 5, [0] * 5, 0, 0, 1, failed, EPOCH)
    with pytest.raises(ValueError, match="129 flags"):
        send_to_mailbox([tensor], [0], 0, 0, 129, failed, EPOCH)
    for wrong in (tensor.t(), tensor.view(-1)[1:]):
        with pytest.raises(ValueError, match="contiguous"):
            send_to_mailbox([wrong], [0], 0, 0, 1, failed, EPOCH)


def test_compiled_send() -> None:
    arguments = {
        **{f"source{i}": "i64" for i in range(4)},
        **{f"size{i}": "i32" for i in range(4)},
        **{f"begin{i}": "i32" for i in range(1, 4)},
        "end": "i32",
        "slot": "i64",
        "flags": "i64",
        "failed": "*i32",
        "epoch": "i32",
    }
    compiled = compile_for_hopper(_send, arguments, {"TILE": 512}, num_warps=8)
    assert (compiled.spilled, compiled.shared) == (0, 0)
    assert compiled.ptx.count("ld.global.v4") == compiled.ptx.count("st.global.v4") == 2
    assert compiled.ptx.index("bar.sync") < compiled.ptx.index("st.release.sys")


def test_small_kernels_fit_beside_a_product() -> None:
    """A product of large tiles leaves 1,024 registers of a processor: a warp of at most 32 each."""
    announce = compile_for_hopper(
        _announce, {"flag": "i64", "failed": "*i32", "epoch": "i32"}, {}, num_warps=1
    )
    assert "st.release.sys" in announce.ptx
    wait = compile_for_hopper(
        _wait,
        {
            "flags": "*i32",
            "num_flags": "i32",
            "failed": "*i32",
            "host_words": "i64",
            "deadline_ns": "i64",
            "epoch": "i32",
        },
        {"FLAGS": MAX_FLAGS},
        num_warps=1,
    )
    assert wait.ptx.index("ld.relaxed.sys") < wait.ptx.index("fence.acq_rel.sys")
    for compiled in (announce, wait):
        assert compiled.registers <= 32
        assert (compiled.spilled, compiled.shared) == (0, 0)
