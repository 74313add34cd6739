"""Runs token sequences through a decoder, in chunks and over pages, for tests and benchmarks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.attention import AttentionMode
from model.checkpoint import Checkpoint, Weights
from model.decoder import Decoder, Trace
from model.inputs import PAGE_SIZE, ForwardInputs
from model.moe import LocalExperts
from model.pages import PageCache, PageFormat
from tests.checkpoints import DEMO


def load_decoder(directory: Path, mode: AttentionMode = "sparse") -> Decoder:
    """A whole checkpoint in float32, experts and all."""
    checkpoint = Checkpoint.open(directory)
    return build_decoder(checkpoint, checkpoint.load(dtype=torch.float32), mode)


def build_decoder(checkpoint: Checkpoint, weights: Weights, mode: AttentionMode = "sparse") -> Decoder:
    """A decoder over loaded weights, which stay as they are: several may share them."""
    config, weights = checkpoint.config, Weights(weights)
    experts = LocalExperts(config, weights, range(config.n_group), "reference")
    return Decoder(config, weights, experts, mode=mode)


@cache
def demo() -> Decoder:
    return load_decoder(DEMO)


def new_cache(decoder: Decoder, num_pages: int, page_format: PageFormat = "full") -> PageCache:
    return PageCache(decoder.config, num_pages, page_format, torch.float32, backend="reference")


def num_pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


@dataclass(frozen=True)
class Run:
    """What a decoder made of T tokens.

    Attributes:
        hidden: [T, D], after the final norm.
        logits: [T, vocab].
        selected: [L, T, index_topk] int32 positions, -1 padded, of every decoder layer.
        routed: [M, T, k] int64 experts, of every layer that has any.
    """

    hidden: Tensor
    logits: Tensor
    selected: Tensor
    routed: Tensor

    @classmethod
    def join(cls, parts: "list[Run]") -> "Run":
        """The parts of one sequence, in order."""
        return cls(
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.logits for part in parts]),
            torch.cat([part.selected for part in parts], dim=1),
            torch.cat([part.routed for part in parts], dim=1),
        )

    def rows(self, start: int, stop: int) -> "Run":
        rows = slice(start, stop)
        return Run(self.hidden[rows], self.logits[rows], self.selected[:, rows], self.routed[:, rows])


def run_pass(decoder: Decoder, inputs: ForwardInputs, cache: PageCache) -> Run:
    """One forward pass, with everything it chose."""
    trace = Trace()
    hidden = decoder.forward(inputs, cache, trace)
    return Run(hidden, decoder.logits(hidden), torch.stack(trace.selected), torch.stack(trace.routed))


def run(
    decoder: Decoder,
    token_ids: Sequence[int],
    *,
    chunk: int | None = None,
    page_format: PageFormat = "full",
    cache: PageCache | None = None,
    pages: list[int] | None = None,
) -> Run:
    """Run one sequence from position 0, all at once or `chunk` tokens a pass."""
    token_ids = list(token_ids)
    pages = list(range(num_pages_for(len(token_ids)))) if pages is None else pages
    cache = new_cache(decoder, max(pages) + 1, page_format) if cache is None else cache
    step = chunk or len(token_ids)
    parts = []
    for start in range(0, len(token_ids), step):
        inputs = ForwardInputs.build([token_ids[start : start + step]], [start], [pages])
        parts.append(run_pass(decoder, inputs, cache))
    return Run.join(parts)


def selection_mask(selected: Tensor, num_keys: int) -> Tensor:
    """[..., num_keys] bool from [..., K] positions, of which -1 counts for nothing."""
    mask = torch.zeros(*selected.shape[:-1], num_keys + 1, dtype=torch.bool)
    columns = selected.long().masked_fill(selected < 0, num_keys)
    return mask.scatter_(-1, columns, True)[..., :num_keys]


@cache
def lookup_documents() -> list[list[int]]:
    """The conversations of the demo's `lookup.jsonl` as tokens, in the file's order."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    documents = []
    for line in (DEMO / "lookup.jsonl").read_text().splitlines():
        text = "<｜begin▁of▁sentence｜>"
        for message in json.loads(line)["messages"]:
            match message["role"]:
                case "system":
                    text += message["content"]
                case "user":
                    text += f"<｜User｜>{message['content']}"
                case "assistant":
                    text += f"<｜Assistant｜></think>{message['content']}<｜end▁of▁sentence｜>"
        documents.append(tokenizer.encode(text, add_special_tokens=False).ids)
    return documents
