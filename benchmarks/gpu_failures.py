"""What carriers do when a peer dies, freezes, comes late or not at all."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_chains import LAYERS, back_parcel, forward_parcel, plan_for
from benchmarks.gpu_pairs import End, Pair, gpu_pair
from workers.transport.carrier import CarrierFailed, Parcel, await_step
from workers.transport.cuda_memory import PeerMemory
from workers.transport.ipc_carrier import Inbox, IpcCarrier
from workers.transport.message import Message
from workers.transport.nccl_carrier import NcclCarrier, unique_id
from workers.transport.pairing import CarrierKind, keep_watch
from workers.transport.protocol import Deadline, DeadlineExceeded, Received
from workers.transport.slots import SlotPlan

KINDS: tuple[CarrierKind, ...] = ("ipc", "copy", "nccl")
TOKENS = 64
ANSWERED = 10  # hops before the peer's end
DEVICE_SECONDS = 0.5  # what a frozen peer is given
_NEVER = 60.0
_SETTLE_SECONDS = 0.3
_PATIENCE = 25.0  # with processes that start side by side


def left_alone(end: End, kind: CarrierKind, timeout: float) -> dict[str, Any]:
    """Rank 0 runs a captured step; rank 1 answers ten hops, says so, and waits for its end."""
    carrier = end.pair(kind, plan_for(TOKENS), timeout)
    forward, back = forward_parcel(TOKENS), back_parcel(TOKENS)
    out = (forward if end.rank == 0 else back).views(
        torch.zeros(plan_for(TOKENS).slot_bytes, dtype=torch.uint8, device=end.device)
    )
    stream = torch.cuda.Stream(end.device)
    torch.cuda.synchronize()
    end.pipe.send(("ok", "ready"))
    end.pipe.recv()
    if end.rank == 1:
        end.agree()
        with torch.cuda.stream(stream):
            for _ in range(ANSWERED):
                carrier.post_wait(0, forward)
                carrier.post_send(0, out)
        stream.synchronize()
        end.pipe.send(("ok", "waiting"))
        time.sleep(_NEVER)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        for _ in range(LAYERS):
            carrier.post_send(0, out)
            carrier.post_wait(0, back)
    end.agree()
    stop = threading.Event()
    watch = threading.Thread(
        target=keep_watch, args=(end.endpoint, {end.peer: carrier}, stop, lambda event: None)
    )
    watch.start()
    with torch.cuda.stream(stream):
        graph.replay()
        event = torch.cuda.Event()
        event.record()
    posted = time.monotonic()
    try:
        await_step(event, [carrier], Deadline.after(2 * timeout))
        found: dict[str, Any] = {"reason": "no failure was seen"}
    except CarrierFailed as error:
        found = {"noticed": time.monotonic(), "reason": str(error)}
    if kind == "nccl":
        graph.reset()
    stream.synchronize()
    found |= {"posted": posted, "drained": time.monotonic()}
    stop.set()
    watch.join()
    began = time.monotonic()
    with suppress(DeadlineExceeded):
        carrier.close()
        found["closed_ms"] = round((time.monotonic() - began) * 1e3, 2)
    found["healthy"] = bool((torch.ones(1000, device=end.device) * 2).sum() == 2000)
    return found


class Turns:
    """Cases wait here until all are ready, go one at a time, and end together: processes that start or end
    beside them disturb their times."""

    def __init__(self, num_cases: int) -> None:
        self._ready, self._done = threading.Barrier(num_cases), threading.Barrier(num_cases)
        self._turn = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[None]:
        self._meet(self._ready)
        try:
            with self._turn:
                time.sleep(_SETTLE_SECONDS)
                yield
        finally:
            self._meet(self._done)

    def _meet(self, barrier: threading.Barrier) -> None:
        with suppress(threading.BrokenBarrierError):  # a case has failed and does not come
            barrier.wait(_PATIENCE)


def _settle(pair: Pair, turns: Turns, number: int, since: str) -> dict[str, Any]:
    """Signal rank 1 once it waits, and put rank 0's times in relation to that, or to its own posting."""
    for rank in range(2):
        pair.hear(rank, _PATIENCE)
    with turns.take():
        for pipe in pair.pipes:
            pipe.send("go")
        pair.hear(1, _PATIENCE)
        time.sleep(0.05)
        at = pair.signal(1, number)
        found = dict(pair.hear(0, _PATIENCE))
    began = at if since == "signal" else found["posted"]
    for name in ("noticed", "drained"):
        if name in found:
            found[f"{name}_ms"] = round((found.pop(name) - began) * 1e3, 2)
    del found["posted"]
    return found


def killed(kind: CarrierKind, gpus: tuple[int, int], turns: Turns) -> dict[str, Any]:
    """kill -9 within a step; times count from the kill."""
    with gpu_pair(left_alone, kind, 30.0, gpus=gpus) as pair:
        return _settle(pair, turns, signal.SIGKILL, "signal")


def frozen(kind: CarrierKind, gpus: tuple[int, int], turns: Turns) -> dict[str, Any]:
    """A peer that is stopped and keeps its connection; times count from posting the step.

    ipc and copy end by the deadline on the device, NCCL by the host's, which is twice that.
    """
    with gpu_pair(left_alone, kind, DEVICE_SECONDS, gpus=gpus) as pair:
        return _settle(pair, turns, signal.SIGSTOP, "posted")


def _old_writes(end: End) -> dict[str, Any]:
    """Rank 1 writes as an older pairing would have; then as the present one."""
    plan, parcel = SlotPlan(2, 4096), Parcel((((16,), torch.int32),))
    inbox = Inbox(plan, end.device)
    end.endpoint.send(end.peer, Message(1, (inbox.handle,)), Deadline.after(30))
    event = end.endpoint.receive(Deadline.after(30), end.peer)
    assert isinstance(event, Received)
    outbox = PeerMemory(event.message.tensors[0], end.device)
    present, old = (
        IpcCarrier(end.peer, epoch, inbox, outbox, plan, timeout=DEVICE_SECONDS) for epoch in (2, 1)
    )
    present.warm_up()
    end.agree()
    if end.rank == 1:
        old.post_send(0, [torch.full((16,), 1, dtype=torch.int32, device=end.device)])
        present.post_send(1, [torch.full((16,), 2, dtype=torch.int32, device=end.device)])
        torch.cuda.synchronize()
        end.agree()
        end.agree()
        return {}
    end.agree()
    (arrived,) = present.post_wait(1, parcel)
    torch.cuda.synchronize()
    present.check()
    present.post_wait(0, parcel)
    torch.cuda.synchronize()
    try:
        present.check()
        reason = "the old write was taken"
    except CarrierFailed as error:
        reason = str(error)
    end.agree()
    return {"present_arrived": arrived.tolist() == [2] * 16, "reason": reason}


def late_write(gpus: tuple[int, int], turns: Turns) -> dict[str, Any]:
    with gpu_pair(_old_writes, gpus=gpus) as pair:
        found = dict(pair.hear(0, _PATIENCE))
        with turns.take():
            return found


def _init_alone(end: End) -> dict[str, Any]:
    if end.rank == 1:
        time.sleep(_NEVER)
    began = time.monotonic()
    try:
        NcclCarrier(
            end.peer,
            1,
            unique_id(),
            is_first=True,
            plan=SlotPlan(1, 4096),
            device=end.device,
            deadline=Deadline.after(2.0),
        )
        reason = "no failure was seen"
    except DeadlineExceeded as error:
        reason = str(error)
    return {"seconds": round(time.monotonic() - began, 2), "reason": reason}


def absent(gpus: tuple[int, int], turns: Turns) -> dict[str, Any]:
    """NCCL's set-up with a peer that does not come; the deadline is 2 s."""
    with gpu_pair(_init_alone, gpus=gpus) as pair:
        found = dict(pair.hear(0, _PATIENCE))
        with turns.take():
            return found


CASES: dict[str, Callable[[tuple[int, int], Turns], dict[str, Any]]] = {
    **{f"killed, {kind}": partial(killed, kind) for kind in KINDS},
    **{f"frozen, {kind}": partial(frozen, kind) for kind in KINDS},
    "late write of an old epoch": late_write,
    "NCCL, absent peer": absent,
}


def failures(gpus: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Every case by its name; what went wrong with a case itself is its outcome."""
    turns = Turns(len(CASES))

    def run(name: str) -> dict[str, Any]:
        try:
            return CASES[name](gpus, turns)
        except (RuntimeError, DeadlineExceeded) as error:
            return {"failed": str(error)}

    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))
