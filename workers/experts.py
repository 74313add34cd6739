"""An expert worker: it holds groups of routed experts of every layer and answers whoever dispatches to it.

    DISPATCH  epoch, layer, sequence, budget, step = urgency; x [t, D], experts [t, k] int16, weights [t, k]
              float32
    COMBINE   the same sequence; [S, t, D] float32, the sums of its S blocks of groups (one at full size)
    REFUSED   the same sequence, the worker's epoch; [1] int64, a `Refusal`

Shapes: t tokens of one message, T tokens, D width, k experts a token, S blocks.
"""

import enum
import math
import threading
from collections import deque

import torch

from kernels.backend import Backend
from model.checkpoint import Checkpoint, routed_experts
from model.config import ModelConfig
from model.moe import DispatchPlan, LocalExperts, experts_of
from model.random_weights import RandomCheckpoint
from workers.placement import ExpertPlacement, PlacementError
from workers.transport.message import Message, TransportError
from workers.transport.protocol import Deadline, DeadlineExceeded, Endpoint, Received

_POLL_SECONDS = 0.05  # how soon a stop is seen
_REPLY_SECONDS = 1.0  # for a sender who gave no budget
_MOST_WAITING = 256  # dispatches among which the urgent are looked for


class Kind(enum.IntEnum):
    """Messages between dispatchers and expert workers."""

    DISPATCH = 1
    COMBINE = 2
    REFUSED = 3


class Urgency(enum.IntEnum):
    """Who is served first where several wait: rows of a decode step, whose users wait for each token."""

    DECODE = 0
    PREFILL = 1


class Refusal(enum.IntEnum):
    """Why a worker did not compute."""

    EPOCH = 1
    SHAPE = 2


def load_experts(
    checkpoint: Checkpoint | RandomCheckpoint,
    groups: range,
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device | str = "cpu",
) -> LocalExperts:
    """Read some groups' experts of every layer, and nothing else of the checkpoint."""
    wanted = routed_experts(experts_of(checkpoint.config, groups))
    weights = checkpoint.load(wanted, dtype=dtype, device=device)
    return LocalExperts(checkpoint.config, weights, groups, backend)


class ExpertWorker:
    """Answers dispatches for the groups that the current placement gives it.

    It may hold more groups than that. `adopt` may be called from another thread while `serve` runs.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        experts: LocalExperts,
        placement: ExpertPlacement,
        dtype: torch.dtype,
    ) -> None:
        """`dtype` is that of the weights, and of the rows it takes."""
        self._name, self._config, self._experts, self._dtype = name, config, experts, dtype
        self._device = experts.device
        self.num_answered = self.num_refused = self.num_late = 0
        self.adopt(placement)

    def adopt(self, placement: ExpertPlacement) -> None:
        """Serve a new epoch from the next message on.

        Raises:
            PlacementError: it asks for groups that are not held here; the old epoch stays.
        """
        share = placement.share_of(self._name)
        if share is None or not set(share.groups) <= set(self._experts.groups):
            asked = share.groups if share else None
            raise PlacementError(f"{self._name} holds {self._experts.groups}, the placement asks for {asked}")
        self._current = placement.epoch, share.groups  # one assignment: `serve` sees both or neither

    def serve(self, endpoint: Endpoint, stop: threading.Event) -> None:
        """Answer until told to stop, decode first. Peers may come and go."""
        waiting: tuple[deque[Received], ...] = tuple(deque() for _ in Urgency)
        while not stop.is_set():
            self._collect(endpoint, waiting)
            for queue in waiting:
                if queue:
                    self._answer(endpoint, queue.popleft())
                    break

    def _collect(self, endpoint: Endpoint, waiting: tuple[deque[Received], ...]) -> None:
        """Take what has come, waiting for something where nothing is there.

        What does not fit stays with the endpoint, whose senders wait then.
        """
        deadline = Deadline.after(0 if any(waiting) else _POLL_SECONDS)
        while sum(map(len, waiting)) < _MOST_WAITING:
            try:
                event = endpoint.receive(deadline)
            except DeadlineExceeded:
                return
            if isinstance(event, Received):
                waiting[min(event.message.step, max(Urgency))].append(event)
            deadline = Deadline.after(0)

    def _answer(self, endpoint: Endpoint, received: Received) -> None:
        if received.deadline.is_over:
            self.num_late += 1  # nobody waits for the answer any more
            return
        reply = self._compute(received.message)
        left = received.deadline.left()
        budget = left if math.isfinite(left) else _REPLY_SECONDS
        try:
            endpoint.send(received.peer.name, reply, Deadline.after(budget))
        except (TransportError, DeadlineExceeded):
            self.num_late += 1  # it is gone, or does not read; its own deadline tells it

    @torch.inference_mode()
    def _compute(self, message: Message) -> Message:
        epoch, groups = self._current
        if message.epoch != epoch:
            return self._refuse(message, Refusal.EPOCH)
        if not self._fits(message):
            return self._refuse(message, Refusal.SHAPE)
        x, experts, weights = (tensor.to(self._device) for tensor in message.tensors)
        sums = self._experts.block_sums(message.layer, x, DispatchPlan(experts.long(), weights), groups)
        self.num_answered += 1
        return Message(
            Kind.COMBINE,
            (sums.cpu(),),
            epoch,
            step=message.step,
            sequence=message.sequence,
            layer=message.layer,
        )

    def _fits(self, message: Message) -> bool:
        """Whether this can be computed here; what another process sent is not believed."""
        config = self._config
        if message.kind != Kind.DISPATCH or len(message.tensors) != 3:
            return False
        if not 0 <= message.layer < config.num_cached_layers or config.is_dense(message.layer):
            return False
        x, experts, weights = message.tensors
        shape = (len(x) if x.ndim else 0, config.num_experts_per_tok)
        return (
            x.dtype == self._dtype
            and x.shape == (shape[0], config.hidden_size)
            and experts.dtype == torch.int16
            and weights.dtype == torch.float32
            and experts.shape == weights.shape == shape
        )

    def _refuse(self, message: Message, why: Refusal) -> Message:
        self.num_refused += 1
        return Message(
            Kind.REFUSED,
            (torch.tensor([why], dtype=torch.int64),),
            self._current[0],
            step=message.step,
            sequence=message.sequence,
            layer=message.layer,
        )
