"""Several micro-batches in one pass: the bits of one, at the experts in turn, and nothing left behind."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint, Weights
from model.decoder import Decoder, MicroBatch, Trace
from model.inputs import ForwardInputs
from model.moe import DispatchPlan, LocalExperts, PendingSum
from model.pages import PageCache
from tests.checkpoints import DEMO
from tests.running import lookup_documents, num_pages_for

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [300, 14, 1, 90]  # the first goes beyond index_topk


class Lost(Exception):
    """An expert is gone."""


@dataclass
class Elsewhere:
    """Experts of this process that behave as if they were far away, and write down what is asked of them."""

    inner: LocalExperts
    fail_at: int | None = None  # the result of this submit fails
    log: list[str] = field(default_factory=list)
    open: set[int] = field(default_factory=set)

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        number = sum(entry.startswith("submit") for entry in self.log)
        self.log.append(f"submit {layer}")
        self.open.add(number)
        return Away(self, number, layer, x, plan)


@dataclass
class Away:
    owner: Elsewhere
    number: int
    layer: int
    x: Tensor
    plan: DispatchPlan

    def result(self) -> Tensor:
        self.owner.log.append(f"result {self.layer}")
        self.owner.open.remove(self.number)
        if self.number == self.owner.fail_at:
            raise Lost
        return self.owner.inner.forward(self.layer, self.x, self.plan)

    def drop(self) -> None:
        self.owner.open.discard(self.number)


@pytest.fixture(scope="module")
def experts() -> Elsewhere:
    checkpoint = Checkpoint.open(DEMO)
    weights = Weights(checkpoint.load(dtype=torch.float32))
    return Elsewhere(LocalExperts(checkpoint.config, weights, range(8), "deterministic"))


@pytest.fixture(scope="module")
def decoder(experts: Elsewhere) -> Decoder:
    checkpoint = Checkpoint.open(DEMO)
    weights = Weights(checkpoint.load(dtype=torch.float32))
    return Decoder(checkpoint.config, weights, experts, backend="deterministic")


@pytest.fixture(autouse=True)
def forgetful(experts: Elsewhere) -> None:
    experts.fail_at, experts.log, experts.open = None, [], set()


def inputs_of(sequences: range) -> ForwardInputs:
    """Prompts of `LENGTHS`, each with pages of its own."""
    document = [token for document in lookup_documents() for token in document]
    firsts = [5 * number for number in sequences]
    return ForwardInputs.build(
        [document[100 * number :][: LENGTHS[number]] for number in sequences],
        [0] * len(sequences),
        [
            list(range(first, first + num_pages_for(LENGTHS[n])))
            for first, n in zip(firsts, sequences, strict=True)
        ],
    )


def new_cache(decoder: Decoder) -> PageCache:
    return PageCache(decoder.config, 20, "fp8", torch.float32, backend="deterministic")


@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 4), (0, 3, 4), (0, 1, 2, 3, 4)])
def test_the_bits_are_those_of_one(decoder: Decoder, cuts: tuple[int, ...]) -> None:
    """Hidden states, pages, and what was selected and routed."""
    whole_cache, cache = new_cache(decoder), new_cache(decoder)
    whole_trace = Trace()
    parts = [MicroBatch(inputs_of(range(*cut)), Trace()) for cut in pairwise(cuts)]
    with torch.inference_mode():
        whole = decoder.forward(inputs_of(range(4)), whole_cache, whole_trace)
        hidden = decoder.forward_in_turn(parts, cache)
    assert [len(part) for part in hidden] == [part.inputs.num_rows for part in parts]
    assert torch.equal(torch.cat(hidden), whole)
    traces = [part.trace for part in parts if part.trace]
    for name in ("selected", "routed"):
        by_layer = zip(*(getattr(trace, name) for trace in traces), strict=True)
        joined = [torch.cat(pieces) for pieces in by_layer]
        assert all(map(torch.equal, joined, getattr(whole_trace, name)))
    for ours, theirs in zip(cache.layers, whole_cache.layers, strict=True):
        assert torch.equal(ours.latents.view(torch.uint8), theirs.latents.view(torch.uint8))
        assert torch.equal(ours.index_keys.view(torch.uint8), theirs.index_keys.view(torch.uint8))


def test_rows_of_both_are_at_the_experts_at_once(decoder: Decoder, experts: Elsewhere) -> None:
    with torch.inference_mode():
        decoder.forward_in_turn([MicroBatch(inputs_of(range(k, k + 1))) for k in (1, 2)], new_cache(decoder))
    of_layer = [entry for layer in range(1, 6) for entry in (f"submit {layer}", f"result {layer}")]
    first, last = of_layer[:1], of_layer[-1:]
    middle = [
        entry
        for result, submit in zip(of_layer[1:-1:2], of_layer[2::2], strict=True)
        for entry in [result, submit] * 2
    ]
    assert experts.log == first * 2 + middle + last * 2


def test_each_is_told_of_its_own_layers(decoder: Decoder) -> None:
    """When the pages are filled, and not before."""
    cache, told = new_cache(decoder), []

    def teller(first_page: int) -> object:
        def on_layer(layer: int) -> None:
            is_filled = [bool(pages.latents[first_page].view(torch.uint8).any()) for pages in cache.layers]
            told.append((first_page, layer, is_filled.index(False)))

        return on_layer

    for pages in cache.layers:
        pages.latents.view(torch.uint8).zero_()
    parts = [MicroBatch(inputs_of(range(k, k + 1)), on_layer=teller(5 * k)) for k in (1, 3)]  # type: ignore[arg-type]
    with torch.inference_mode():
        decoder.forward_in_turn(parts, cache)
    assert told == [(page, layer, layer + 1) for layer in range(6) for page in (5, 15)]


@pytest.mark.parametrize("fail_at", [0, 1, 4, 5, 8, 9])
def test_a_failure_leaves_nothing_at_the_experts(decoder: Decoder, experts: Elsewhere, fail_at: int) -> None:
    experts.fail_at = fail_at
    parts = [MicroBatch(inputs_of(range(k, k + 1))) for k in (1, 2)]
    with pytest.raises(Lost), torch.inference_mode():
        decoder.forward_in_turn(parts, new_cache(decoder))
    assert not experts.open


def test_a_failure_of_our_own_leaves_nothing_either(decoder: Decoder, experts: Elsewhere) -> None:
    def fail(layer: int) -> None:
        if layer == 3:
            raise Lost

    parts = [MicroBatch(inputs_of(range(1, 2))), MicroBatch(inputs_of(range(2, 3)), on_layer=fail)]
    with pytest.raises(Lost), torch.inference_mode():
        decoder.forward_in_turn(parts, new_cache(decoder))
    assert experts.log[-1] == "submit 3"
    assert not experts.open
