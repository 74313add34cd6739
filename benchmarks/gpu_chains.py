"""A decode step's hops and nothing else: 61 times rows to the experts and sums back, in a CUDA graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_pairs import End
from workers.transport.carrier import Carrier, Parcel
from workers.transport.pairing import CarrierKind
from workers.transport.slots import SlotPlan

LAYERS = 61
HOPS = 2 * LAYERS
TOKENS = (1, 16, 64, 128, 256)
LOADS = {"64x7168x24576": (64, 7168, 24576), "8192^3": (8192, 8192, 8192)}
LOADED_TOKENS = 64
_REPLAYS, _SHORT = 50, 4
_WIDTH, _CHOSEN = 7168, 8
_LOADED_MS = 60.0  # of hops beside products


def forward_parcel(tokens: int) -> Parcel:
    """Rows in e4m3, their scales, expert ids and weights: 7,456 bytes a token."""
    return Parcel(
        (
            ((tokens, _WIDTH), torch.float8_e4m3fn),
            ((tokens, _WIDTH // 128), torch.float32),
            ((tokens, _CHOSEN), torch.int32),
            ((tokens, _CHOSEN), torch.float32),
        )
    )


def back_parcel(tokens: int) -> Parcel:
    """Sums: 14,336 bytes a token."""
    return Parcel((((tokens, _WIDTH), torch.bfloat16),))


def plan_for(tokens: int) -> SlotPlan:
    return SlotPlan(1, max(forward_parcel(tokens).num_bytes, back_parcel(tokens).num_bytes))


@dataclass
class Chain:
    """The hops of a step as one end posts them.

    Args:
        laid_out: whether what is sent lies as it will in the slot, or tensor by tensor.
    """

    end: End
    carrier: Carrier
    tokens: int
    laid_out: bool

    def __post_init__(self) -> None:
        parcels = forward_parcel(self.tokens), back_parcel(self.tokens)
        self.sent, self.taken = parcels if self.end.rank == 0 else parcels[::-1]
        self.stream = torch.cuda.Stream(self.end.device, priority=-1)
        self.outgoing = self._random(self.sent, 100 + self.end.rank)
        self.expected = self._random(self.taken, 101 - self.end.rank)
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.end.device)

    def _random(self, parcel: Parcel, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(self.end.device).manual_seed(seed)
        memory = torch.randint(
            0, 256, (parcel.num_bytes,), dtype=torch.uint8, device=self.end.device, generator=generator
        )
        views = parcel.views(memory)
        # Clones made in the tensors' own order may come to lie as they do in a slot.
        return views if self.laid_out else tuple([view.clone() for view in reversed(views)][::-1])

    def capture(self, *, verified: bool = False) -> torch.cuda.CUDAGraph:
        """A step; verified: what is sent differs from hop to hop, and what arrives is compared."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="relaxed"):
            for _ in range(LAYERS):
                if self.end.rank == 0:
                    self._send(verified)
                    self._take(verified)
                else:
                    self._take(verified)
                    self._send(verified)
        return graph

    def _send(self, verified: bool) -> None:
        if verified:
            for tensor in self.outgoing:
                _bytes(tensor).add_(1)
        self.carrier.post_send(0, self.outgoing)

    def _take(self, verified: bool) -> None:
        taken = self.carrier.post_wait(0, self.taken)
        if verified:
            for tensor, expected in zip(taken, self.expected, strict=True):
                _bytes(expected).add_(1)
                self.wrong.add_((_bytes(tensor) != _bytes(expected)).sum())

    def run(self, graph: torch.cuda.CUDAGraph, replays: int) -> float:
        """Replay and wait; microseconds of a hop."""
        self.end.agree()
        with torch.cuda.stream(self.stream):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(replays):
                graph.replay()
            ended.record()
        ended.synchronize()
        self.carrier.check()
        return float(began.elapsed_time(ended)) * 1e3 / replays / HOPS

    def verify(self) -> int:
        """Wrong bytes in three steps of changing content."""
        graph = self.capture(verified=True)
        self.run(graph, 3)
        graph.reset()
        return int(self.wrong)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


class Load:
    """Products that run back to back on a stream of their own."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        rows, inner, columns = shape
        a = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
        b = torch.randn(inner, columns, dtype=torch.bfloat16, device=device)
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        self.stream, self._graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        count = max(1, int(2e11 / (rows * inner * columns)))  # a few milliseconds
        torch.mm(a, b, out=out)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, stream=self.stream, capture_error_mode="relaxed"):
            for _ in range(count):
                torch.mm(a, b, out=out)
        self._kept = a, b, out
        self.milliseconds = self.run(3) / 3

    def start(self, replays: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Events of its begin and end."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            began.record()
            for _ in range(replays):
                self._graph.replay()
            ended.record()
        return began, ended

    def run(self, replays: int) -> float:
        """Milliseconds, with nothing beside it."""
        began, ended = self.start(replays)
        ended.synchronize()
        return float(began.elapsed_time(ended))


VARIANTS: tuple[tuple[CarrierKind, bool], ...] = (
    ("ipc", False),
    ("copy", False),
    ("copy", True),
    ("nccl", False),
    ("nccl", True),
)
"""Carrier, and whether what is sent is laid out."""


def chains(end: End) -> list[dict[str, Any]]:
    """Rows of every carrier and size, alone and beside products on rank 0's GPU."""
    loads = {name: Load(shape, end.device) if end.rank == 0 else None for name, shape in LOADS.items()}
    rows = []
    for kind, laid_out in VARIANTS:
        carrier = end.pair(kind, plan_for(max(TOKENS)))
        for tokens in TOKENS:
            rows.append({"kind": kind, "laid_out": laid_out} | _row(end, carrier, tokens, laid_out, loads))
            if end.rank == 0:
                print(rows[-1], flush=True)
        carrier.close()
    return rows


def _row(
    end: End, carrier: Carrier, tokens: int, laid_out: bool, loads: dict[str, Load | None]
) -> dict[str, Any]:
    chain = Chain(end, carrier, tokens, laid_out)
    wrong = chain.verify()
    graph = chain.capture()
    chain.run(graph, _SHORT)
    hop = min(chain.run(graph, _REPLAYS) for _ in range(2))
    loaded = tokens == LOADED_TOKENS
    row = {
        "tokens": tokens,
        "wrong_bytes": wrong,
        "hop_us": hop,
        "step_ms": hop * HOPS / 1e3,
        "loaded": {name: _beside(chain, graph, load) for name, load in loads.items() if loaded},
    }
    graph.reset()
    return row


def _beside(chain: Chain, graph: torch.cuda.CUDAGraph, load: Load | None) -> dict[str, float]:
    """Microseconds of a hop while the load runs, and what share of its speed the load loses meanwhile."""
    hop, replays = 200.0, _SHORT  # a guess, for a first look
    for _ in range(2):
        replays = chain.end.agree(replays)
        if load is None:
            chain.run(graph, replays)
            continue
        needed = int(1.5 * hop * replays * HOPS / 1e3 / load.milliseconds) + 3
        alone = load.run(needed)
        began, ended = load.start(needed)
        hop = chain.run(graph, replays)
        outlived = not ended.query()
        ended.synchronize()
        slowed = (began.elapsed_time(ended) - alone) / (hop * replays * HOPS / 1e3)
        replays = max(_SHORT, int(_LOADED_MS * 1e3 / hop / HOPS))
    return {} if load is None else {"hop_us": hop, "load_slowed": slowed, "outlived": outlived}
