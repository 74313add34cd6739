"""What an operator sees: one value that the gateway shows at `/status` and `eightfold status` reads."""

import time
from dataclasses import dataclass

from pydantic import TypeAdapter

from cluster.gateway.backend import Parts
from cluster.gateway.core import Gateway


@dataclass(frozen=True)
class ClusterStatus:
    """The whole at one moment.

    Attributes:
        weights_digest: names the weights.
        context: tokens of one request, prompt and answer.
        up_seconds: since this gateway began.
        waiting, running: open requests of this gateway without and with a token.
        journal_tokens: what those may come to hold.
    """

    model: str
    weights_digest: str
    context: int
    ready: bool
    draining: bool
    up_seconds: int
    waiting: int
    running: int
    journal_tokens: int
    parts: Parts

    @classmethod
    def of(cls, gateway: Gateway) -> "ClusterStatus":
        """That of a gateway and of what is behind it."""
        facts, load = gateway.backend.facts, gateway.backend.load()
        return cls(
            gateway.model,
            facts.digest,
            facts.context,
            gateway.is_ready,
            gateway.is_draining,
            int(time.time() - gateway.created),
            load.waiting,
            load.running,
            gateway.journal.num_tokens,
            gateway.backend.parts(),
        )

    def to_json(self) -> bytes:
        return TypeAdapter(ClusterStatus).dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> "ClusterStatus":
        """Raises ValueError for what is no status."""
        return TypeAdapter(ClusterStatus).validate_json(data)
