"""The backend over real workers in threads of this process, for tests; no Ray."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from cluster.directory import Directory, WorkerEntry
from cluster.gateway.backend import ModelFacts
from cluster.gateway.cluster_backend import BackendLimits, ClusterBackend, ClusterStream
from cluster.router import Router
from model.sampling_params import SamplingParams
from model.text import load_text
from model.tokenizer import Tokenizer
from tests.checkpoints import DEMO
from tests.workers.workers import SECRET, TOKEN, Worker, running
from workers.local import LocalModel
from workers.prefix import PrefixHasher
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.protocol import Address
from workers.wire import Role


class Prompt(NamedTuple):
    ids: tuple[int, ...]
    answer: list[int]


@cache
def prompts() -> dict[str, Prompt]:
    """Of the demo's oracle, with 32 greedy tokens each."""
    encode = Tokenizer.load(DEMO).encode
    known = json.loads((DEMO / "oracle.json").read_text())["prompts"]
    return {one["name"]: Prompt(tuple(encode(one["prompt"])), one["output_ids"]) for one in known}


def greedy(max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


@dataclass
class Listed:
    """A directory that a test writes."""

    entries: dict[str, tuple[Role, Address]] = field(default_factory=dict)
    is_broken: bool = False
    calls: int = 0

    def add(self, role: Role, worker: Worker) -> None:
        self.entries[worker.name] = role, worker.endpoint.address

    async def __call__(self, calls_prefill: bool) -> Directory:
        self.calls += calls_prefill
        if self.is_broken:
            raise RuntimeError("the supervisor is away")
        return Directory(
            workers=tuple(
                WorkerEntry(role, "engine", "node", 1, address) for role, address in self.entries.values()
            )
        )


def a_backend(model: LocalModel, listed: Listed, limits: BackendLimits) -> ClusterBackend:
    context = min(model.config.max_position_embeddings, 16384)
    facts = ModelFacts(model.config, *load_text(DEMO, model.config), model.checkpoint.digest, context)
    router = Router(PrefixHasher(SECRET), 512)
    return ClusterBackend(facts, PeerEndpoint(EndpointConfig("gateway", TOKEN)), router, listed, limits)


@asynccontextmanager
async def started(
    model: LocalModel, listed: Listed, limits: BackendLimits | None = None
) -> AsyncIterator[ClusterBackend]:
    backend = a_backend(model, listed, limits or BackendLimits())
    backend.start()
    try:
        if {role for role, _ in listed.entries.values()} == {"prefill", "decode"}:
            await backend.wait_until_ready(10)
        yield backend
    finally:
        await backend.stop()


@contextmanager
def pair(model: LocalModel, **options: Any) -> Iterator[tuple[Listed, Worker, Worker]]:
    """One worker of each role."""
    with (
        running(model, "prefill", "prefill") as prefill,
        running(model, "decode", "decode", **options) as decode,
    ):
        listed = Listed()
        listed.add("prefill", prefill)
        listed.add("decode", decode)
        yield listed, prefill, decode


async def read(stream: ClusterStream) -> list[int]:
    """A whole answer; it must come in order."""
    tokens = [token async for token in stream]
    assert [token.position for token in tokens] == list(
        range(tokens[0].position, tokens[0].position + len(tokens))
    )
    return [token.token_id for token in tokens]


async def eventually(condition: Callable[[], bool], seconds: float = 8.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())
