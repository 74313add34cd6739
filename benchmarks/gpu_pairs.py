"""Two processes with a GPU each, connected as actors of a cluster are: what benchmarks of carriers run in."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from benchmarks.processes import new_endpoint
from workers.transport import nccl_carrier
from workers.transport.carrier import Carrier
from workers.transport.endpoint import PeerEndpoint
from workers.transport.message import Message
from workers.transport.pairing import CarrierKind, pair
from workers.transport.protocol import Deadline, DeadlineExceeded, Received
from workers.transport.slots import SlotPlan

_NAMES = ("attention", "experts")
_NUMBERS = 99  # kind of our messages
_MEETING_SECONDS = 60.0


@dataclass
class End:
    """One of the two: rank 0 asks, rank 1 answers."""

    rank: int
    endpoint: PeerEndpoint
    pipe: Connection
    device: torch.device
    epoch: int = 0

    @property
    def peer(self) -> str:
        return _NAMES[1 - self.rank]

    def pair(self, kind: CarrierKind, plan: SlotPlan, timeout: float = 20.0) -> Carrier:
        """Both ends call it, in the same order."""
        self.epoch += 1
        deadline = Deadline.after(_MEETING_SECONDS)
        return pair(
            self.endpoint, self.peer, kind, self.epoch, plan, self.device, timeout=timeout, deadline=deadline
        )

    def agree(self, number: int = 0) -> int:
        """Both ends come here; the number is rank 0's."""
        deadline = Deadline.after(_MEETING_SECONDS)
        self.endpoint.send(self.peer, Message(_NUMBERS, step=number), deadline)
        event = self.endpoint.receive(deadline, self.peer)
        assert isinstance(event, Received), event
        return number if self.rank == 0 else event.message.step


Role = Callable[..., Any]
"""What an end does: `role(end, *arguments)`; its result goes to the parent."""


@dataclass
class Pair:
    """The two processes as the parent sees them."""

    processes: list[BaseProcess]
    pipes: list[Connection]

    def hear(self, rank: int, seconds: float = 120.0) -> Any:
        """What an end sends next, or its result.

        Raises:
            RuntimeError: its role failed.
            DeadlineExceeded: it says nothing.
        """
        if not self.pipes[rank].poll(seconds):
            raise DeadlineExceeded(f"hearing {_NAMES[rank]}")
        status, result = self.pipes[rank].recv()
        if status != "ok":
            raise RuntimeError(f"{_NAMES[rank]}: {result}")
        return result

    def signal(self, rank: int, number: int) -> float:
        """Signal an end; when that was, by the clock of all processes of this machine."""
        pid = self.processes[rank].pid
        assert pid is not None
        at = time.monotonic()
        os.kill(pid, number)
        return at


def _serve(pipe: Connection, rank: int, gpu: int, role: Role, arguments: Sequence[Any]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # as Ray sets it for an actor
    os.environ.update(nccl_carrier.ENVIRONMENT)
    try:
        torch.zeros(1, device="cuda")  # before the connection, which shall end first when the process does
        endpoint = new_endpoint(_NAMES[rank], same_host=True)
        pipe.send(("ok", endpoint.address))
        address = pipe.recv()
        if rank == 1:
            endpoint.connect(address, Deadline.after(_MEETING_SECONDS))
        while not endpoint.peers:
            endpoint.pump(0.01)
        pipe.send(("ok", role(End(rank, endpoint, pipe, torch.device("cuda", 0)), *arguments)))
    except BaseException:
        traceback.print_exc()  # who hears one end alone may not hear of the cause
        pipe.send(("failed", traceback.format_exc()))


@contextmanager
def gpu_pair(role: Role, *arguments: Any, gpus: tuple[int, int] = (0, 1)) -> Iterator[Pair]:
    """Run a role in two processes; whatever they do, they are gone at the end."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in _NAMES]
    processes: list[BaseProcess] = [
        context.Process(target=_serve, args=(theirs, rank, gpus[rank], role, arguments), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    running = Pair(processes, [ours for ours, _ in pipes])
    try:
        addresses = [running.hear(rank) for rank in range(2)]
        for ours, address in zip(running.pipes, reversed(addresses), strict=True):
            ours.send(address)
        yield running
    finally:
        for process, ours in zip(processes, running.pipes, strict=True):
            process.kill()
            process.join()
            ours.close()
