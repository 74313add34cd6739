"""What gateways and attention workers say to each other: frozen values, as JSON in a message's first tensor.

    gateway -> worker     WATCH, GENERATE, CANCEL
    worker -> gateway     TOKENS, FAILED, STATUS, STAGES
    prefill -> decode     RESERVE, PAGES, PUSHED, HAND_OVER, DROP
    decode -> prefill     GRANT, ADOPTED, DROP
    attention -> experts  JOIN, where rows go from GPU to GPU (`expert_seats.py`)
    experts -> attention  SEAT, REFUSED

PAGES and PUSHED are the kinds without JSON: header and tensors say all (`handoff.py`). Values are checked
against their types when they are read; nothing is unpickled. A request's time left travels in the header's
budget. STAGES comes when a request that is traced has ended at a worker, also after its last token
(`stages.py`).
"""

import enum
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from model.errors import RequestError
from workers.load import WorkerLoad
from workers.sequence import Request, Token
from workers.transport.message import MalformedMessage, Message
from workers.transport.protocol import Address

T = TypeVar("T")

Role = Literal["prefill", "decode"]


class Kind(enum.IntEnum):
    """Kinds of message; the experts' own begin at 1 (`experts.py`)."""

    WATCH = 16
    GENERATE = 17
    CANCEL = 18
    TOKENS = 19
    FAILED = 20
    STATUS = 21
    STAGES = 22
    RESERVE = 32
    GRANT = 33
    PAGES = 34
    HAND_OVER = 35
    ADOPTED = 36
    DROP = 37
    PUSHED = 38
    JOIN = 65
    SEAT = 66
    REFUSED = 67


@dataclass(frozen=True)
class Generate:
    """Run a request: prefill it and hand it over to `decode`, or run all of it where there is none."""

    request: Request
    decode: Address | None = None


@dataclass(frozen=True)
class Cancel:
    """Forget a request and free its pages."""

    uid: str


Why = Literal[
    "replica_lost", "experts_lost", "step_failed", "overloaded", "timeout", "numerical_error", "invalid"
]


@dataclass(frozen=True)
class Failed:
    """A request ends here without its answer; `field` and `problem` are those of a `RequestError`."""

    uid: str
    why: Why
    field: str = ""
    problem: str = ""


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker says of itself, several times a second.

    Attributes:
        keys_added, keys_removed: pages that can be shared from now on, or no longer, as `short_key`s.
        is_full: `keys_added` is everything there is; forget what was said before.
        drafted, accepted: drafts judged and accepted since the start, by position.
        dispatched, copies_to: tokens sent to experts, once a layer, and copies of them by expert worker.
        most_nodes: expert nodes that one token was sent to at most.
        sent_pages, sent_bytes: pages of single layers that were handed over, and their size.
        hand_overs, hand_over_seconds: sequences handed over, and the time from the first token of each until
            the other side had adopted it, all together.
        stray: messages with pages that came after their lease was over, and were dropped.
        leaving: it is to be sent nothing new, and ends once nobody needs it.
        prefilled_tokens: of prompts, computed.
        busy_seconds: spent in steps.
        decode_seconds: the same, once for each sequence that decoded in a step.
        decode_tokens: tokens that those sequences got.
    """

    role: Role
    load: WorkerLoad
    is_full: bool = False
    keys_added: tuple[str, ...] = ()
    keys_removed: tuple[str, ...] = ()
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    num_drafts: int = 0
    steps: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    epoch: int = 0
    dispatched: int = 0
    copies_to: tuple[tuple[str, int], ...] = ()
    most_nodes: int = 0
    sent_pages: int = 0
    sent_bytes: int = 0
    hand_overs: int = 0
    hand_over_seconds: float = 0.0
    stray: int = 0
    leaving: bool = False
    prefilled_tokens: int = 0
    busy_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @property
    def copies(self) -> int:
        """Copies sent to all expert workers together."""
        return sum(count for _, count in self.copies_to)


@dataclass(frozen=True)
class Reserve:
    """Take pages for a prompt that we compute. `client` is the peer that reads the tokens."""

    request: Request
    client: str
    digest: str


@dataclass(frozen=True)
class WayAddress:
    """Where the peer of a way between two GPUs waits to be joined (`ways.py`). `epoch` names the pairing."""

    address: Address
    epoch: int


@dataclass(frozen=True)
class Grant:
    """Pages are reserved under a lease; those before `first_page` are known here and need not be sent.

    `way` is the one by which they are to come; None for messages.
    """

    uid: str
    lease: int
    first_page: int
    way: WayAddress | None = None


@dataclass(frozen=True)
class HandOver:
    """All pages of the prompt were sent, and this is its first token: go on from here."""

    uid: str
    lease: int
    first: Token


@dataclass(frozen=True)
class Adopted:
    """The sequence runs here now; the pages at the source are no longer needed."""

    uid: str


@dataclass(frozen=True)
class Drop:
    """The hand-over of a request is off; whoever holds pages for it frees them."""

    uid: str
    why: Why


@dataclass(frozen=True)
class Join:
    """Take a seat at experts: for so many micro-batches of so many rows, under that placement.

    Where several want to be served, those go first who are urgent.
    """

    num_slots: int
    max_rows: int
    epoch: int
    is_urgent: bool


@dataclass(frozen=True)
class Refused:
    """There is no seat."""

    reason: str


def pack(kind: Kind, body: object, budget_us: int = 0) -> Message:
    """A message that carries a value."""
    data = bytearray(_adapter(cast(Hashable, type(body))).dump_json(body))
    return Message(kind, (torch.frombuffer(data, dtype=torch.uint8),), budget_us=budget_us)


def pack_tokens(tokens: list[Token]) -> Message:
    """The tokens of a step, of several requests."""
    data = bytearray(_adapter(list[Token]).dump_json(tokens))
    return Message(Kind.TOKENS, (torch.frombuffer(data, dtype=torch.uint8),))


def unpack(kind: type[T], message: Message) -> T:
    """The value that a message carries.

    Raises:
        MalformedMessage: it is none of this type.
    """
    try:
        value: T = _adapter(cast(Hashable, kind)).validate_json(_bytes(message.tensors[0]))
    except (RequestError, ValidationError, ValueError, IndexError, TypeError) as error:
        raise MalformedMessage(f"no {kind} in a message of kind {message.kind}") from error
    return value


def short_key(key: bytes) -> str:
    """Enough of a page's name to guess where a prefix lies; whoever holds the page compares all of it."""
    return key[:8].hex()


@cache  # pydantic builds these slowly
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, kind))


def _bytes(tensor: Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ValueError("a body is a vector of bytes")
    return tensor.numpy().tobytes()
