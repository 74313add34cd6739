"""The routed experts of a model whose experts are elsewhere.

`RemoteExperts` sends each token once to every worker it needs and adds the answers in the tree of groups
(`placement.py`), whenever they come. A layer whose worker is lost waits for the next placement and is sent
again, for as long as its time lasts: experts are stateless, and the bits are the same.

    DispatchError
    ├── WorkerLost      a worker is gone, and nobody took its place in time
    └── WorkerFailed    a worker answered what no worker should

Shapes: T tokens, D width, t tokens that one worker gets.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from model.moe import DispatchPlan
from workers.experts import Kind, Refusal, Urgency
from workers.placement import ExpertPlacement, ExpertShare, PartialSum, combine, node_lists
from workers.transport.message import Message
from workers.transport.protocol import (
    Deadline,
    DeadlineExceeded,
    Endpoint,
    PeerLost,
    PeerRefused,
    PeerUnreachable,
    Received,
)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.02  # between attempts, and between looks for a lost worker


class DispatchError(Exception):
    """Base of what can go wrong between a model and its experts."""


class WorkerLost(DispatchError):
    """A worker is gone, and was not replaced in the layer's time. A later step may find its successor.

    Args:
        peer: its name.
        reason: how we know.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer, self.reason = peer, reason

    def __str__(self) -> str:
        return f"expert worker {self.peer} is lost: {self.reason}"


class WorkerFailed(DispatchError):
    """A worker answered what no worker should: the two sides differ in model or version."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer, self.reason = peer, reason

    def __str__(self) -> str:
        return f"expert worker {self.peer}: {self.reason}"


class PlacementSource(Protocol):
    """Whoever knows the newest placement; control plane. Must not wait."""

    def current(self) -> ExpertPlacement: ...


@dataclass
class DispatchStats:
    """What was sent since the start. `copies` / `tokens` is the traffic that node-limited routing saves.

    `copies_to` counts by worker: how evenly the experts' load lies. `wait_seconds` went by until results were
    there that somebody waited for.
    """

    layers: int = 0
    tokens: int = 0
    copies_to: Counter[str] = field(default_factory=Counter)
    most_nodes: int = 0  # of one token
    retries: int = 0
    wait_seconds: float = 0.0

    @property
    def copies(self) -> int:
        """To all workers together."""
        return self.copies_to.total()


@dataclass
class _Part:
    """One worker's share of a layer."""

    share: ExpertShare
    rows: Tensor  # [t]
    sums: Tensor | None = None  # [S, t, D]


class PendingSum:
    """A layer whose answers are on their way. `result` may be called once."""

    def __init__(
        self,
        owner: "RemoteExperts",
        layer: int,
        x: Tensor,
        plan: DispatchPlan,
        device: torch.device,
        deadline: Deadline,
    ) -> None:
        self.layer, self.x, self.plan, self.device, self.deadline = layer, x, plan, device, deadline
        self.placement: ExpertPlacement | None = None
        self.parts: dict[str, _Part] = {}
        self.sequence = 0
        self.failure: WorkerFailed | None = None
        self.lost: WorkerLost | None = None  # of this attempt
        self.refused_at: int | None = None  # the epoch of a worker that refused this attempt
        self.other_epoch: int | None = None  # the same, of any attempt
        self._owner = owner

    @property
    def missing(self) -> list[str]:
        return [peer for peer, part in self.parts.items() if part.sums is None]

    @property
    def is_to_retry(self) -> bool:
        """Whether this attempt comes to nothing."""
        return self.refused_at is not None or self.lost is not None

    @property
    def complaint(self) -> str:
        """What to say when its time is over."""
        if self.other_epoch is not None and self.placement is not None:
            ours = self.placement.epoch
            return f"layer {self.layer}: our placement has epoch {ours}, a worker's has {self.other_epoch}"
        return f"layer {self.layer}: no answer from {', '.join(self.missing)}"

    def result(self) -> Tensor:
        """[T, D] float32: wait for the answers and add them.

        Raises:
            WorkerLost, WorkerFailed: see there.
            DeadlineExceeded: the layer's time is over.
        """
        return self._owner.finish(self)

    def drop(self) -> None:
        """Nobody will take it: answers that still come are ignored."""
        self._owner.forget(self)


class RemoteExperts:
    """The `Experts` of a model whose experts are in other processes. Owns what its endpoint receives.

    One thread; several layers or micro-batches may be pending at once, and their results be asked for in any
    order.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        source: PlacementSource,
        *,
        topk_group: int,
        layer_seconds: float,
        urgency: Urgency = Urgency.DECODE,
    ) -> None:
        """`layer_seconds` is the time a layer has from `submit` to its last answer, connecting included."""
        self._urgency = urgency
        self._endpoint, self._source = endpoint, source
        self._topk_group, self._layer_seconds = topk_group, layer_seconds
        self._pending: dict[int, PendingSum] = {}
        self._num_sent = 0
        self.stats = DispatchStats()

    def meet(self, deadline: Deadline) -> None:
        """Connect with every worker, before rows wait for it: a busy one takes its time to greet.

        Raises:
            TransportError: one of them cannot be had in time; the first layer that needs it tries again.
        """
        for share in self._source.current().shares:
            self._endpoint.connect(share.address, deadline)

    def forward(self, layer: int, x: Tensor, plan: DispatchPlan) -> Tensor:
        """[T, D] float32, as `Experts.forward`."""
        return self.submit(layer, x, plan).result()

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        """Send the rows of x [T, D] to their experts. x and plan must stay as they are until the result.

        Rows on a GPU travel by way of the host, which waits for them.

        Raises:
            WorkerLost, DeadlineExceeded: see there.
            TooManyNodes: the plan does not keep to `topk_group` workers a token.
        """
        plan = DispatchPlan(plan.experts.cpu(), plan.weights.cpu())
        deadline = Deadline.after(self._layer_seconds)
        pending = PendingSum(self, layer, x.cpu(), plan, x.device, deadline)
        self._dispatch(pending)
        self.stats.layers += 1
        self.stats.tokens += len(x)
        return pending

    def finish(self, pending: PendingSum) -> Tensor:
        """As `PendingSum.result`."""
        pause, started = _FIRST_PAUSE, time.perf_counter()
        try:
            while pending.missing or pending.is_to_retry:
                if pending.failure:
                    raise pending.failure
                if pending.is_to_retry:
                    pause = self._retry(pending, pause)
                    continue
                self._receive(pending)
        finally:
            self.forget(pending)
            self.stats.wait_seconds += time.perf_counter() - started
        return self._combine(pending)

    def forget(self, pending: PendingSum) -> None:
        """As `PendingSum.drop`."""
        self._pending.pop(pending.sequence, None)

    def _dispatch(self, pending: PendingSum) -> None:
        placement = self._source.current()
        lists, most_nodes = node_lists(pending.plan, placement, self._topk_group)
        self._num_sent += 1
        pending.sequence, pending.placement, pending.parts = self._num_sent, placement, {}
        pending.refused_at = pending.lost = None
        self._pending[pending.sequence] = pending
        experts = pending.plan.experts.to(torch.int16)
        sent_tensors = pending.x, experts, pending.plan.weights
        try:
            for share, rows in lists:
                is_all = len(rows) == len(pending.x)
                tensors = sent_tensors if is_all else tuple(tensor[rows] for tensor in sent_tensors)
                self._send(share, tensors, placement.epoch, pending)
                pending.parts[share.peer] = _Part(share, rows)
        except WorkerLost as error:
            pending.lost = error
            return
        except BaseException:
            del self._pending[pending.sequence]
            raise
        self.stats.copies_to.update({share.peer: len(rows) for share, rows in lists})
        self.stats.most_nodes = max(self.stats.most_nodes, most_nodes)

    def _send(self, share: ExpertShare, tensors: tuple[Tensor, ...], epoch: int, pending: PendingSum) -> None:
        message = Message(
            Kind.DISPATCH,
            tensors,
            epoch,
            step=self._urgency,
            sequence=pending.sequence,
            layer=pending.layer,
            budget_us=pending.deadline.left_us(),
        )
        try:
            if share.peer not in self._endpoint.peers:
                self._take_last_words(share.peer)
                self._endpoint.connect(share.address, pending.deadline)
            self._endpoint.send(share.peer, message, pending.deadline)
        except (PeerLost, PeerUnreachable, PeerRefused) as error:
            raise WorkerLost(share.peer, error.reason) from error

    def _retry(self, pending: PendingSum, pause: float) -> float:
        """Send the whole layer again: to a new placement, or to a worker that is behind ours."""
        self.forget(pending)  # answers to the first attempt are late from here on
        if pending.deadline.is_over:
            raise pending.lost or DeadlineExceeded(pending.complaint)
        time.sleep(min(pause, pending.deadline.left()))
        if pending.lost is None or self._is_replaced(pending.lost.peer, pending):
            self.stats.retries += 1
            self._dispatch(pending)
        return min(2 * pause, _LONGEST_PAUSE)

    def _is_replaced(self, peer: str, pending: PendingSum) -> bool:
        """Whether there is another placement since, or only the connection was lost."""
        placement = self._source.current()
        assert pending.placement
        if placement.epoch != pending.placement.epoch or peer in self._endpoint.peers:
            return True
        address = next(share.address for share in placement.shares if share.peer == peer)
        try:
            self._take_last_words(peer)
            self._endpoint.connect(address, pending.deadline)
        except (PeerLost, PeerUnreachable, PeerRefused, DeadlineExceeded):
            return False
        return True

    def _receive(self, waiting: PendingSum) -> None:
        """Take one event, whosever it is."""
        try:
            event = self._endpoint.receive(waiting.deadline)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(waiting.complaint) from error
        self._handle(event)

    def _handle(self, event: Received | PeerLost) -> None:
        if isinstance(event, PeerLost):
            for pending in self._pending.values():
                if event.peer in pending.missing:
                    pending.lost = WorkerLost(event.peer, event.reason)
        elif (found := self._pending.get(event.message.sequence)) is not None:
            self._take(found, event.peer.name, event.message)

    def _take_last_words(self, peer: str) -> None:
        """Handle what a lost connection left, its loss last, so that a new one is not taken for lost."""
        while True:
            event = self._endpoint.receive(Deadline.after(0), peer)
            self._handle(event)
            if isinstance(event, PeerLost):
                return

    def _take(self, pending: PendingSum, peer: str, message: Message) -> None:
        part = pending.parts.get(peer)
        if message.kind == Kind.REFUSED:
            if message.tensors and message.tensors[0].tolist() == [Refusal.EPOCH]:
                pending.refused_at = pending.other_epoch = message.epoch
            else:
                pending.failure = WorkerFailed(peer, "it refused the shape of a dispatch")
            return
        num_blocks = len(part.share.blocks) if part else 0
        expected = (num_blocks, len(part.rows) if part else 0, pending.x.shape[1])
        found = [(tensor.dtype, tuple(tensor.shape)) for tensor in message.tensors]
        if part is None or message.kind != Kind.COMBINE or found != [(torch.float32, expected)]:
            pending.failure = WorkerFailed(peer, f"it answered {found} for float32 {expected}")
        else:
            part.sums = message.tensors[0]

    def _combine(self, pending: PendingSum) -> Tensor:
        """Add the parts in the tree of groups. A token that a worker did not get adds nothing there."""
        assert pending.placement is not None
        num_tokens, width = pending.x.shape
        sums: list[tuple[range, PartialSum | None]] = []
        for share in pending.placement.shares:
            part = pending.parts.get(share.peer)
            if part is None or part.sums is None:
                sums.extend((block, None) for block in share.blocks)
            else:
                rows = None if len(part.rows) == num_tokens else part.rows
                sums.extend(
                    (block, PartialSum(values, rows))
                    for block, values in zip(share.blocks, part.sums, strict=True)
                )
        return combine(sums, num_tokens, width).to(pending.device)
