"""Messages written straight into another GPU's memory, and the wait for those that come.

A message lies in a slot as its tensors, each at its place (units of 16 bytes). Every program that writes a
part of it raises a flag of its own when that part is there; the receiver waits for all of them, lowers them,
and reads the message where it lies. A raised flag holds the epoch of the pairing, so what an older peer still
writes is taken for nothing, and so every replay of a CUDA graph sends and waits for the same values.

A wait ends without its message when the host says so, or when its deadline is over. That is noted on the
device, so that all later waits end at once, and nothing more is announced to the peer: what is computed since
may be garbage. Addresses are plain numbers, those of the peer mean nothing to torch.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

UNIT = 16  # bytes; a tensor of a message starts at a multiple of it in both memories
MAX_TENSORS = 4
MAX_FLAGS = 128  # most programs that write one message
_PROGRAM_BYTES = 8192  # so few that a message of one token is written by one program
_TILE = 512  # units that a program has in flight
_WARPS = 8
_SPINS = tl.constexpr(32)  # looks at the flags between two looks at the clock and across PCIe


def num_flags(num_bytes: int) -> int:
    """How many programs write a message of so many bytes: what a receiver must know of it."""
    return max(1, min(MAX_FLAGS, -(-num_bytes // _PROGRAM_BYTES)))


def send_to_mailbox(
    tensors: Sequence[Tensor],
    offsets: Sequence[int],
    slot: int,
    flags: int,
    num_flags: int,
    failed: Tensor,
    epoch: int,
) -> None:
    """Write tensors into a slot of the peer and raise its flags, unless a failure has been noted.

    Args:
        tensors: at most MAX_TENSORS, contiguous, on our GPU, beginning at a multiple of 16 bytes. What lies
            behind the last of them up to the next such multiple is written too.
        offsets: where each of them begins in the slot, in bytes; ascending multiples of 16.
        slot, flags: addresses as our GPU sees them.
        num_flags: how many programs write, each with its flag; at most MAX_FLAGS.
        failed: int32 [1], not 0 once something has failed.
        epoch: what a raised flag holds; not 0.

    Raises:
        ValueError: tensors are others.
    """
    if len(tensors) > MAX_TENSORS or not 0 < num_flags <= MAX_FLAGS:
        raise ValueError(f"{len(tensors)} tensors and {num_flags} flags, most are {MAX_TENSORS}, {MAX_FLAGS}")
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() % UNIT:
            raise ValueError("a message's tensors are contiguous and begin at a multiple of 16 bytes")
    absent = MAX_TENSORS - len(tensors)
    sources = [tensor.data_ptr() for tensor in tensors] + [0] * absent
    sizes = [-(-tensor.nbytes // UNIT) for tensor in tensors] + [0] * absent
    begins = [offset // UNIT for offset in offsets]
    end = begins[-1] + sizes[len(tensors) - 1] if tensors else 0
    begins += [end] * absent
    _send[(num_flags,)](
        *sources, *sizes, *begins[1:], end, slot, flags, failed, epoch, TILE=_TILE, num_warps=_WARPS
    )  # fmt: skip


def raise_flag(flag: int, failed: Tensor, epoch: int) -> None:
    """Say that a message is there which copies earlier in the stream wrote, unless a failure has been noted.

    One warp of few registers: it finds room beside a product that fills the GPU.

    Args:
        flag: address of the slot's first flag as our GPU sees it.
        failed, epoch: as in `send_to_mailbox`.
    """
    _announce[(1,)](flag, failed, epoch, num_warps=1)


def wait_for_mailbox(
    flags: Tensor, num_flags: int, failed: Tensor, host_words: Tensor, deadline_ns: int, epoch: int
) -> None:
    """Hold the stream until all flags of a message are raised, and lower them; or until that is pointless.

    Args:
        flags: int32 [MAX_FLAGS] of the slot, on our GPU.
        num_flags: how many of them the message raises.
        failed: int32 [1] on our GPU: not 0 once something has failed.
        host_words: int32 [2], pinned: what the host asks for, 0 or the reason to stop with; and the reason
            with which a wait ended, for the host to read.
        deadline_ns: how long to wait.
        epoch: what a raised flag holds.
    """
    _wait[(1,)](
        flags, num_flags, failed, host_words.data_ptr(), deadline_ns, epoch, FLAGS=MAX_FLAGS, num_warps=1
    )


TIMED_OUT = tl.constexpr(2)


@triton.jit
def _raise(flag, epoch):
    """Store an epoch with release semantics for all GPUs; by one thread, after a barrier of all of them."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first st.release.sys.global.u32 [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [flag, epoch],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _look(words):
    """What stands there now, whoever wrote it: on this GPU, on another, or on the host."""
    return tl.inline_asm_elementwise(
        "ld.relaxed.sys.global.u32 $0, [$1];", "=r,l", [words], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _acquire():
    """What was written before the flags we saw is seen by what follows."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(
    do_not_specialize=[
        "source0", "source1", "source2", "source3", "size0", "size1", "size2", "size3",
        "begin1", "begin2", "begin3", "end", "slot", "flags", "epoch",
    ]
)  # fmt: skip
def _send(
    source0: tl.int64, source1: tl.int64, source2: tl.int64, source3: tl.int64,  # addresses of tensors
    size0: tl.int32, size1: tl.int32, size2: tl.int32, size3: tl.int32,  # in units
    begin1: tl.int32, begin2: tl.int32, begin3: tl.int32,  # of the others, in units of the slot
    end: tl.int32,  # of the last one
    slot: tl.int64, flags: tl.int64,  # addresses on the peer
    failed,  # [1] i32
    epoch: tl.int32,
    TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    failure = tl.load(failed)
    share = tl.cdiv(end, tl.num_programs(0))
    stop = tl.minimum((program + 1) * share, end)
    word = tl.arange(0, 4)[None, :]
    for start in range(program * share, stop, TILE):
        unit = start + tl.arange(0, TILE)
        source = tl.where(unit < begin1, source0, source1)
        size = tl.where(unit < begin1, size0, size1)
        begin = tl.where(unit < begin1, 0, begin1)
        source = tl.where(unit < begin2, source, source2)
        size = tl.where(unit < begin2, size, size2)
        begin = tl.where(unit < begin2, begin, begin2)
        source = tl.where(unit < begin3, source, source3)
        size = tl.where(unit < begin3, size, size3)
        begin = tl.where(unit < begin3, begin, begin3)
        at = unit - begin
        ours = (source + at.to(tl.int64) * 16).to(tl.pointer_type(tl.int32))
        theirs = (slot + unit.to(tl.int64) * 16).to(tl.pointer_type(tl.int32))
        ours = tl.multiple_of(ours, 16)
        theirs = tl.multiple_of(theirs, 16)
        is_there = ((unit < stop) & (at < size))[:, None]
        words = tl.load(ours[:, None] + word, mask=is_there)
        tl.store(theirs[:, None] + word, words, mask=is_there)
    tl.debug_barrier()  # all threads have written before one of them says so
    if failure == 0:
        _raise((flags + program.to(tl.int64) * 4).to(tl.pointer_type(tl.int32)), epoch)


@triton.jit(do_not_specialize=["flag", "epoch"])
def _announce(flag: tl.int64, failed, epoch: tl.int32):
    if tl.load(failed) == 0:
        _raise(flag.to(tl.pointer_type(tl.int32)), epoch)


@triton.jit(do_not_specialize=["num_flags", "host_words", "deadline_ns", "epoch"])
def _wait(
    flags,  # [FLAGS] i32
    num_flags: tl.int32,
    failed,  # [1] i32
    host_words: tl.int64,  # address of [2] i32
    deadline_ns: tl.int64,
    epoch: tl.int32,
    FLAGS: tl.constexpr,
):
    asked = host_words.to(tl.pointer_type(tl.int32))
    each = flags + tl.minimum(tl.arange(0, FLAGS), num_flags - 1)
    spins = 0
    began = tl.zeros((), tl.int64)
    failure = _look(failed)
    missing = tl.sum((_look(each) != epoch).to(tl.int32))
    while (missing > 0) & (failure == 0):
        spins += 1
        if spins % _SPINS == 0:
            failure = tl.maximum(_look(failed), _look(asked))
            now = globaltimer()
            if began == 0:
                began = now
            if (failure == 0) & (now - began > deadline_ns):
                failure = TIMED_OUT
        missing = tl.sum((_look(each) != epoch).to(tl.int32))
    if missing > 0:
        tl.store(failed, failure)
        tl.store(asked + 1, failure)
    else:
        _acquire()
        tl.store(each, 0)
