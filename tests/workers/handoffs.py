"""One side of a hand-over, played by a test."""

import torch

from model.sampling_params import SamplingParams
from tests.workers.workers import SECONDS, Stranger, Worker
from workers.engine import EngineConfig
from workers.page_pool import pages_for
from workers.sequence import Request, Token
from workers.transport.message import Message
from workers.transport.protocol import Deadline
from workers.wire import Grant, HandOver, Kind, Reserve, pack

NO_DRAFTS = EngineConfig(chunk=64)


def greedy(max_tokens: int = 4, **overrides: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **overrides)


def reserve(source: Stranger, decode: Worker, request: Request, seconds: float = SECONDS) -> Grant:
    body = Reserve(request, "client", decode.worker._config.digest)
    source.send(decode, pack(Kind.RESERVE, body, Deadline.after(seconds).left_us()))
    return source.expect(Kind.GRANT, Grant)


def pages(worker: Worker, grant: Grant, layer: int, num_pages: int) -> Message:
    """Pages full of ones, after those that are known."""
    own = worker.worker._receiver._cache.layers[layer]
    latents = torch.ones_like(own.latents[:num_pages])
    keys = torch.ones_like(own.index_keys[:num_pages])
    return Message(Kind.PAGES, (latents, keys), sequence=grant.lease, layer=layer, step=grant.first_page)


def first_token(request: Request) -> Token:
    return Token(request.uid, 11, len(request.prompt_ids))


def hand_over(source: Stranger, decode: Worker, request: Request) -> None:
    grant = reserve(source, decode, request)
    for layer in range(len(decode.worker._receiver._cache.layers)):
        source.send(decode, pages(decode, grant, layer, pages_for(len(request.prompt_ids))))
    source.send(decode, pack(Kind.HAND_OVER, HandOver(request.uid, grant.lease, first_token(request))))
