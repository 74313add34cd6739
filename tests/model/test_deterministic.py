"""The promise of the deterministic backend, for whole models.

The bits of a sequence's hidden states, logits, pages, drafts and choices are its own: they are the same alone
and among others, in chunks of any length, in prefill and in decode, with any number of rows verified at once,
and however the experts are divided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, UnsupportedKernel
from kernels.group_tree import add_all, blocks_of
from model.checkpoint import Checkpoint, Weights
from model.decoder import Decoder
from model.inputs import ForwardInputs
from model.moe import DispatchPlan, LocalExperts
from model.pages import PageCache, PageFormat
from tests.checkpoints import DEMO, facts, write_checkpoint
from tests.running import lookup_documents, num_pages_for

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS: list[PageFormat] = ["full", "fp8"]
NUM_TOKENS = 700  # of the demo's long prompt, which selects 256


@dataclass(frozen=True)
class Result:
    """One sequence's outcome: hidden states, logits and drafted states by row, and the bytes of its pages."""

    hidden: Tensor
    logits: Tensor
    drafted: Tensor
    pages: list[Tensor]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Result)
        pairs = zip(self._tensors, other._tensors, strict=True)
        return all(torch.equal(ours, theirs) for ours, theirs in pairs)

    @property
    def _tensors(self) -> list[Tensor]:
        return [self.hidden, self.logits, self.drafted, *self.pages]


def build(checkpoint: Checkpoint, weights: Weights, backend: Backend) -> Decoder:
    weights = Weights(weights)
    experts = LocalExperts(checkpoint.config, weights, range(checkpoint.config.n_group), backend)
    return Decoder(checkpoint.config, weights, experts, backend=backend)


@cache
def demo_weights() -> tuple[Checkpoint, Weights]:
    checkpoint = Checkpoint.open(DEMO)
    return checkpoint, checkpoint.load(dtype=torch.float32)


@cache
def demo(backend: Backend = "deterministic") -> Decoder:
    return build(*demo_weights(), backend)


@torch.inference_mode()
def run(
    decoder: Decoder,
    sequences: Sequence[list[int]],
    chunks: Sequence[int],
    page_format: PageFormat = "full",
    backend: Backend = "deterministic",
) -> list[Result]:
    """Run sequences side by side, each in chunks of its own length; the MTP module follows with the rows."""
    owned: list[list[int]] = []
    for sequence in sequences:
        first = owned[-1][-1] + 1 if owned else 0
        owned.append(list(range(first, first + num_pages_for(len(sequence)))))
    num_pages = owned[-1][-1] + 1
    cache = PageCache(decoder.config, num_pages, page_format, decoder.dtype, backend=backend)
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    while live := [i for i, sequence in enumerate(sequences) if done[i] < len(sequence)]:
        rows = [slice(done[i], done[i] + chunks[i]) for i in live]
        place = [done[i] for i in live], [owned[i] for i in live]
        hidden = decoder.forward(
            ForwardInputs.build([sequences[i][part] for i, part in zip(live, rows, strict=True)], *place),
            cache,
        )
        logits, drafted = decoder.logits(hidden), torch.zeros_like(hidden)
        if decoder.can_draft:
            following = [
                [*sequences[i], 0][part.start + 1 : part.stop + 1] for i, part in zip(live, rows, strict=True)
            ]
            drafted = decoder.draft(ForwardInputs.build(following, *place), hidden, cache)
        start = 0
        for i, part in zip(live, rows, strict=True):
            stop = start + len(sequences[i][part])
            own = slice(start, stop)
            parts[i].append((hidden[own], logits[own], drafted[own]))
            start, done[i] = stop, done[i] + chunks[i]
    return [
        Result(
            *(torch.cat(column) for column in zip(*of_sequence, strict=True)),
            [
                tensor[pages].view(torch.uint8)
                for layer in cache.layers
                for tensor in (layer.latents, layer.index_keys)
            ],
        )
        for of_sequence, pages in zip(parts, owned, strict=True)
    ]


def alone(decoder: Decoder, tokens: list[int], page_format: PageFormat, chunk: int = 2048) -> Result:
    return run(decoder, [tokens], [chunk], page_format)[0]


@cache
def long_prompt() -> list[int]:
    return [token for document in lookup_documents() for token in document][:NUM_TOKENS]


@cache
def expected(page_format: PageFormat) -> Result:
    """The long prompt in one pass, alone."""
    return alone(demo(), long_prompt(), page_format)


@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("chunk", [64, 100])
def test_a_prompt_in_chunks(page_format: PageFormat, chunk: int) -> None:
    assert alone(demo(), long_prompt(), page_format, chunk) == expected(page_format)


def test_a_prompt_in_very_small_chunks() -> None:
    prompt = long_prompt()[:300]
    assert alone(demo(), prompt, "fp8", 7) == alone(demo(), prompt, "fp8")


@pytest.mark.parametrize("page_format", FORMATS)
def test_a_prompt_among_others(page_format: PageFormat) -> None:
    """Neighbours of other lengths: one is decoding, one is short, one runs in chunks of its own."""
    others = [long_prompt()[100:114], long_prompt()[:50][::-1], long_prompt()[300:420]]
    everyone = [others[0], long_prompt(), *others[1:]]
    results = run(demo(), everyone, [1, 100, 50, 33], page_format)
    assert results[1] == expected(page_format)
    for other, result in zip(others, [results[0], *results[2:]], strict=True):
        assert result == alone(demo(), other, page_format)


@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("start", [0, 250, 660])
def test_decode_equals_prefill(page_format: PageFormat, start: int) -> None:
    """Token by token, at the beginning, over the edge of index_topk, and far beyond it."""
    tokens = long_prompt()[: start + 12]
    decoder = demo()
    pages = list(range(num_pages_for(len(tokens))))
    cache = PageCache(decoder.config, len(pages), page_format, torch.float32, backend="deterministic")
    with torch.inference_mode():
        if start:
            decoder.forward(ForwardInputs.build([tokens[:start]], [0], [pages]), cache)
        for at in range(start, len(tokens)):
            hidden = decoder.forward(ForwardInputs.build([[tokens[at]]], [at], [pages]), cache)
            assert torch.equal(hidden[0], expected(page_format).hidden[at])
            assert torch.equal(decoder.logits(hidden)[0], expected(page_format).logits[at])


@pytest.mark.parametrize("num_rows", [2, 3, 4])
def test_verified_rows_equal_single_ones(num_rows: int) -> None:
    """Rows of drafts, right ones and then wrong ones in their place, which the next step overwrites."""
    tokens, start = long_prompt(), 500
    decoder = demo()
    pages = list(range(num_pages_for(NUM_TOKENS)))
    cache = PageCache(decoder.config, len(pages), "fp8", torch.float32, backend="deterministic")
    with torch.inference_mode():
        decoder.forward(ForwardInputs.build([tokens[:start]], [0], [pages]), cache)
        for at in range(start, start + 12, num_rows):
            wrong = [tokens[at], *[9] * (num_rows - 1)]
            rejected = decoder.forward(ForwardInputs.build([wrong], [at], [pages]), cache)
            assert torch.equal(rejected[0], expected("fp8").hidden[at])
            right = tokens[at : at + num_rows]
            hidden = decoder.forward(ForwardInputs.build([right], [at], [pages]), cache)
            assert torch.equal(hidden, expected("fp8").hidden[at : at + num_rows])


def test_logits_of_any_rows() -> None:
    hidden = expected("full").hidden
    for rows in ([3], [5, 3], list(range(3, 60)), list(range(300, 3, -1))):
        assert torch.equal(demo().logits(hidden[rows]), expected("full").logits[rows])


@pytest.mark.parametrize("split", [(8,), (4, 4), (1, 3, 4), (1,) * 8])
def test_experts_however_divided(split: tuple[int, ...]) -> None:
    """Each part as an actor would hold it, given other tokens at a time than one process is."""
    checkpoint, weights = demo_weights()
    config, generator = checkpoint.config, torch.Generator().manual_seed(0)
    x = torch.randn(40, config.hidden_size, generator=generator)
    scores = torch.rand(40, config.n_routed_experts, generator=generator)
    chosen = scores.topk(config.num_experts_per_tok).indices.sort(-1).values
    plan = DispatchPlan(chosen, torch.rand(chosen.shape, generator=generator))
    whole = LocalExperts(config, Weights(weights), range(8), "deterministic").forward(3, x, plan)

    sums: list[tuple[range, Tensor]] = []
    for first, size in zip([sum(split[:i]) for i in range(len(split))], split, strict=True):
        groups = range(first, first + size)
        part = LocalExperts(config, Weights(weights), groups, "deterministic")
        pieces = [
            part.block_sums(3, x[rows], DispatchPlan(chosen[rows], plan.weights[rows]), groups)
            for rows in torch.arange(40).split([1, 25, 14])
        ]
        sums += zip(blocks_of(groups), torch.cat(pieces, dim=1), strict=True)
    assert torch.equal(add_all(sums, torch.add), whole)


@pytest.mark.parametrize("page_format", FORMATS)
def test_close_to_the_reference(page_format: PageFormat) -> None:
    """Before anything is selected, both compute one function; a choice of experts may hang by a thread."""
    tokens = long_prompt()[: demo().config.index_topk]
    reference = run(demo("reference"), [tokens], [2048], page_format, "reference")[0]
    ours = alone(demo(), tokens, page_format)
    difference = (ours.logits - reference.logits).abs().amax(-1)
    assert difference.median() < (1e-4 if page_format == "full" else 1e-2)
    assert (ours.logits.argmax(-1) == reference.logits.argmax(-1)).float().mean() > 0.98


SMALL = [
    facts(num_nextn_predict_layers=1),
    facts(
        hidden_size=130, moe_intermediate_size=33, num_attention_heads=3, num_key_value_heads=3, index_topk=20
    ),
    facts(q_lora_rank=17, kv_lora_rank=64, v_head_dim=11, num_attention_heads=1, num_key_value_heads=1),
    facts(hidden_size=64, intermediate_size=50, index_n_heads=3, index_head_dim=64, index_topk=64),
]


@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("shape", range(len(SMALL)))
def test_small_models_of_odd_widths(tmp_path: Path, shape: int, page_format: PageFormat) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model", SMALL[shape], seed=shape))
    decoder = build(checkpoint, checkpoint.load(dtype=torch.float32), "deterministic")
    generator = torch.Generator().manual_seed(shape)
    prompts = [torch.randint(320, (length,), generator=generator).tolist() for length in (40, 70, 100)]
    singly = [alone(decoder, prompt, page_format) for prompt in prompts]
    for chunks in ([1, 150, 33], [7, 5, 64], [200, 200, 200]):
        assert run(decoder, prompts, chunks, page_format) == singly


def test_dense_attention_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model", facts()))
    weights = Weights(checkpoint.load(dtype=torch.float32))
    experts = LocalExperts(checkpoint.config, weights, range(4), "deterministic")
    with pytest.raises(UnsupportedKernel, match=r"^attention: has no 'deterministic' form .*: use 'sparse'$"):
        Decoder(checkpoint.config, weights, experts, mode="dense", backend="deterministic")
