"""What the gateway asks of whoever runs the model. One process or a cluster: the same seam."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.autoscaling import RoleScaling
from cluster.directory import ExpertEntry, RoleEngines
from cluster.gateway.errors import Overloaded
from model.chat.encoding import ChatEncoding
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from workers.load import WorkerLoad
from workers.sequence import Request, Token
from workers.stages import Stages
from workers.wire import WorkerStatus


@dataclass(frozen=True)
class ModelFacts:
    """What the gateway knows of the model that it speaks for.

    `context` is what one request may hold, prompt and answer together; `digest` names the weights.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    encoding: ChatEncoding
    digest: str
    context: int


@dataclass(frozen=True)
class WorkerReport:
    """A worker: which engine it belongs to, where it runs, and what it said last."""

    name: str
    engine: str
    node: str
    pid: int
    status: WorkerStatus


@dataclass(frozen=True)
class Parts:
    """What the model runs on.

    Attributes:
        epoch: that of the expert placement, 0 where experts are not apart.
        engines: of each role, what there shall be; empty where one process is all.
        scaling: of each role whose engines come and go.
    """

    epoch: int
    workers: tuple[WorkerReport, ...]
    experts: tuple[ExpertEntry, ...]
    engines: tuple[RoleEngines, ...] = ()
    scaling: tuple[RoleScaling, ...] = ()


def check_room(num_waiting: int, max_waiting: int, num_open: int, max_open: int) -> None:
    """Refuses one more request where too many wait for a token, or too many are open altogether.

    All that are open share what there is: one more than can be borne within anybody's patience makes every
    answer late, so that under an overload nobody would get what all are computed for.

    Raises:
        Overloaded: there are as many as there may be.
    """
    if num_waiting >= max_waiting:
        raise Overloaded(f"{max_waiting} requests are waiting already; try again a little later")
    if num_open >= max_open:
        raise Overloaded(f"{max_open} requests are open already; try again a little later")


class TokenStream(Protocol):
    """The tokens of one accepted request, each once and in order; the last one has a finish reason."""

    def __aiter__(self) -> "TokenStream": ...

    async def __anext__(self) -> Token:
        """The next token.

        Raises:
            ReplicaLost: whoever ran it is gone; no token follows, and another run may give the rest.
            Refusal: the request has failed; no token follows.
        """
        ...

    async def aclose(self) -> None:
        """Cancels the request if it still runs: its pages are free within one step."""
        ...


OnStages = Callable[[str, Stages], None]
"""Told by a worker, by name, what a request that is `traced` went through there, once it has ended there."""


class Backend(Protocol):
    """Runs requests.

    `on_stages` is called in the event loop, also after the end of an answer.
    """

    on_stages: OnStages

    @property
    def facts(self) -> ModelFacts: ...

    async def generate(self, request: Request) -> TokenStream:
        """Takes a request on. Whether there is room for one more is the caller's question (`check_room`).

        Raises:
            Overloaded: nobody can run it now.
            ReplicaLost: whoever was to run it is gone.
            RequestError: it can never run here.
        """
        ...

    def check_room(self) -> None:
        """Refuses what could not be taken on now, before time is spent on reading it.

        Raises:
            Overloaded: too many requests are open.
        """
        ...

    def load(self) -> WorkerLoad: ...

    def parts(self) -> Parts:
        """What there is to see of whoever runs the model."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether requests can be run at all."""
        ...
