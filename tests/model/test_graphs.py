"""Decode steps filled up to buckets: the rows that count are as without, whatever the others are.

Recording needs a GPU; what is recorded does not. Here it runs again wherever a graph would be replayed.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.decoder import Decoder
from model.graphs import Bucket, DecodeGraphs, StepRows
from model.inputs import ForwardInputs
from model.pages import PageCache
from tests.checkpoints import DEMO
from tests.model.fused.test_fused import fused, new_cache
from tests.running import lookup_documents, num_pages_for
from workers.local import LocalModel, ModelOptions

LENGTHS = [300, 14, 1, 90]  # the first goes beyond index_topk


def again(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """In place of a recording."""
    result = run()
    return lambda: result.copy_(run()), result


def test_at_most_a_quarter_is_filled_up() -> None:
    for num_sequences in range(1, 1000):
        found = Bucket.of(num_sequences, 2, 100, fused().config)
        assert num_sequences <= found.num_sequences <= 1.25 * num_sequences
        assert found.num_rows == 2 * found.num_sequences
        assert Bucket.of(found.num_sequences, 2, 100, fused().config) == found


def test_a_bucket_selects_where_its_steps_select() -> None:
    config = fused().config
    most, topk = config.max_position_embeddings, config.index_topk
    contexts = [Bucket.of(1, 1, longest, config).context for longest in range(1, most + 1)]
    assert all(longest <= context for longest, context in enumerate(contexts, 1))
    assert all((context > topk) == (longest > topk) for longest, context in enumerate(contexts, 1))
    assert sorted(set(contexts)) == [topk * 2**i for i in range(len(set(contexts)))]
    assert contexts[-1] == most


class Steps:
    """Sequences whose contexts lie in pages; the pages that are nobody's hold NaN."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        counts = [num_pages_for(length + 8) for length in LENGTHS]
        first = [1 + sum(counts[:i]) for i in range(len(counts))]
        self.pages = [list(range(start, start + count)) for start, count in zip(first, counts, strict=True)]
        self.documents = lookup_documents()[: len(LENGTHS)]
        self.cache = new_cache(decoder, 64 * (2 + sum(counts)), "triton" if self.on_gpu else "reference")
        for pages in self.cache.layers:
            pages.latents.fill_(0xFF)
            pages.index_keys.fill_(0xFF)
        with torch.inference_mode():
            inputs = ForwardInputs.build(
                [document[:length] for document, length in zip(self.documents, LENGTHS, strict=True)],
                [0] * len(LENGTHS),
                self.pages,
                decoder.device,
            )
            hidden = decoder.forward(inputs, self.cache)
            tokens = torch.cat([inputs.token_ids[1:], inputs.token_ids[:1]])  # any will do
            decoder.draft(ForwardInputs(tokens, *list(vars(inputs).values())[1:5]), hidden, self.cache)

    @property
    def on_gpu(self) -> bool:
        return self.decoder.device.type == "cuda"

    def rows(self, *counts: int) -> StepRows:
        """So many new rows of each sequence; none leaves it out."""
        chosen = [i for i, count in enumerate(counts) if count]
        starts = [LENGTHS[i] for i in chosen]
        tokens = [self.documents[i][LENGTHS[i] :][: counts[i]] for i in chosen]
        return StepRows(tokens, starts, [self.pages[i] for i in chosen])

    def copy(self) -> PageCache:
        twin = new_cache(self.decoder, 64 * self.cache.num_pages, "triton" if self.on_gpu else "reference")
        for pages, others in zip(self.cache.layers, twin.layers, strict=True):
            others.latents.copy_(pages.latents)
            others.index_keys.copy_(pages.index_keys)
        return twin

    def graphs(self, cache: PageCache) -> DecodeGraphs:
        return DecodeGraphs(self.decoder, cache, None if self.on_gpu else again)

    def eager(self, rows: StepRows, cache: PageCache) -> Tensor:
        with torch.inference_mode():
            return self.decoder.forward(self.inputs(rows), cache)

    def inputs(self, rows: StepRows) -> ForwardInputs:
        return ForwardInputs.build(rows.token_ids, rows.starts, rows.pages, self.decoder.device)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def steps(request: pytest.FixtureRequest) -> Steps:
    if request.param == "cpu":
        return Steps(fused())
    options = ModelOptions(dtype="bfloat16", pages="fp8", kernels="triton", device="cuda")
    return Steps(LocalModel(DEMO, options).decoder)


def valid_rows(hidden: Tensor, firsts: list[int], counts: list[int]) -> Tensor:
    return torch.cat([hidden[first : first + count] for first, count in zip(firsts, counts, strict=True)])


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Up to the order of sums, which changes with the number of rows: a few steps of bf16 and of e4m3."""
    assert found.isfinite().all()
    assert (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()


def written(latents: Tensor) -> Tensor:
    """[P, 64] bool: which slots hold a record."""
    return (latents != 0xFF).any(-1)


STEPS = [(1, 1, 1, 1), (0, 1, 1, 1), (0, 2, 1, 4), (3, 1, 2, 4), (1, 0, 0, 0), (0, 0, 3, 0)]


@pytest.mark.parametrize("counts", STEPS)
def test_filled_up_steps_are_the_steps(steps: Steps, counts: tuple[int, ...]) -> None:
    rows, cache, other = steps.rows(*counts), steps.copy(), steps.copy()
    expected = steps.eager(rows, cache)
    with torch.inference_mode():
        found = steps.graphs(other).forward(rows)
    assert_same(valid_rows(found.hidden, found.firsts, rows.counts), expected)
    assert found.hidden.isfinite().all(), "rows that fill up are numbers too"
    for ours, theirs in zip(other.layers, cache.layers, strict=True):
        assert torch.equal(written(ours.latents), written(theirs.latents)), "the same slots are written"


@pytest.mark.parametrize("micro_batches", [2, 3])
@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 1, 2, 4), (1, 0, 0, 0)])
def test_micro_batches_are_the_step(steps: Steps, counts: tuple[int, ...], micro_batches: int) -> None:
    rows, cache, other = steps.rows(*counts), steps.copy(), steps.copy()
    expected = steps.eager(rows, cache)
    graphs = DecodeGraphs(steps.decoder, other, None if steps.on_gpu else again, micro_batches=micro_batches)
    with torch.inference_mode():
        found = graphs.forward(rows)
    assert_same(valid_rows(found.hidden, found.firsts, rows.counts), expected)
    for ours, theirs in zip(other.layers, cache.layers, strict=True):
        assert torch.equal(written(ours.latents), written(theirs.latents))


def test_what_was_forgotten_is_recorded_anew(steps: Steps) -> None:
    rows, cache = steps.rows(0, 1, 1, 1), steps.copy()
    graphs = steps.graphs(cache)
    with torch.inference_mode():
        first = graphs.forward(rows).hidden.clone()
        for _ in range(2):
            graphs.forget()
            assert torch.equal(graphs.forward(rows).hidden, first)


def test_a_bucket_serves_other_steps_than_it_was_recorded_for(steps: Steps) -> None:
    """A larger step, then smaller ones of other sequences and rows: nothing of the last one is left."""
    cache, other = steps.copy(), steps.copy()
    graphs = steps.graphs(other)
    one, three = steps.rows(0, 1, 0, 0), steps.rows(0, 0, 1, 1)

    def joined(*parts: StepRows) -> StepRows:
        return StepRows(
            [tokens for part in parts for tokens in part.token_ids],
            [start for part in parts for start in part.starts],
            [pages for part in parts for pages in part.pages],
        )

    ten, nine = joined(*[three] * 5), joined(*[three] * 4, one)
    config = steps.decoder.config
    assert ten.bucket(config) == nine.bucket(config)
    with torch.inference_mode():
        for rows in (ten, nine):
            found = graphs.forward(rows)
            assert_same(valid_rows(found.hidden, found.firsts, rows.counts), steps.eager(rows, cache))
    for ours, theirs in zip(other.layers, cache.layers, strict=True):
        assert torch.equal(written(ours.latents), written(theirs.latents))


def test_what_is_warm_is_not_recorded_again(steps: Steps) -> None:
    recorded: list[Tensor] = []

    def counted(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        recorded.append(again(run)[1])
        return again(run)

    cache = steps.copy()
    graphs = DecodeGraphs(steps.decoder, cache, counted)
    graphs.warm_up(9, 100, most_rows=4)
    assert len(recorded) == 3
    assert all(
        torch.equal(ours.latents, theirs.latents)
        for ours, theirs in zip(cache.layers, steps.cache.layers, strict=True)
    )
    rows = steps.rows(0, 1, 4, 2)
    rows = StepRows(rows.token_ids * 3, rows.starts * 3, rows.pages * 3)
    with torch.inference_mode():
        hidden = graphs.forward(rows).hidden
        graphs.draft(rows, hidden, list(range(0, 36, 4)))
    assert len(recorded) == 3
    graphs.warm_up(11, 100, most_rows=4)
    assert len(recorded) == 6


def test_what_was_not_used_for_longest_is_recorded_again(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[int] = []

    def counted(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        replay, result = again(run)
        recorded.append(len(result))
        return replay, result

    monkeypatch.setattr("model.graphs.MOST_RECORDED", 2)
    graphs, rows = DecodeGraphs(steps.decoder, steps.copy(), counted), steps.rows(0, 1, 1, 1)
    runs = {n: StepRows(rows.token_ids[:n], rows.starts[:n], rows.pages[:n]) for n in (1, 2, 3)}
    with torch.inference_mode():
        for num_sequences in (1, 2, 1, 3, 1, 3, 2):
            graphs.forward(runs[num_sequences])
    assert recorded == [1, 2, 3, 2]


def test_tokens_may_come_from_the_device(steps: Steps) -> None:
    """What is no token is one row's business."""
    cache, other = steps.copy(), steps.copy()
    rows = steps.rows(1, 1, 1, 0)
    tokens = torch.tensor([ids[0] for ids in rows.token_ids], device=steps.decoder.device)
    expected = steps.eager(rows, cache)
    graphs = steps.graphs(other)
    places = [[-1]] * len(rows.starts)
    with torch.inference_mode():
        found = graphs.forward(StepRows(places, rows.starts, rows.pages, tokens)).hidden[:3].clone()
        assert_same(found, expected)
        tokens[1] = -2
        found = graphs.forward(StepRows(places, rows.starts, rows.pages, tokens)).hidden
        assert_same(found[[0, 2]], expected[[0, 2]])
        some = StepRows([[-1], *rows.token_ids[1:]], rows.starts, rows.pages, tokens[:1])
        assert_same(graphs.forward(some).hidden[:3], expected)


@pytest.mark.parametrize("counts", STEPS)
def test_filled_up_drafts_are_the_drafts(steps: Steps, counts: tuple[int, ...]) -> None:
    rows, cache, other = steps.rows(*counts), steps.copy(), steps.copy()
    num_rows = sum(rows.counts)
    hidden = torch.randn(
        num_rows + 3, steps.decoder.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    hidden = hidden.bfloat16().to(steps.decoder.device)
    firsts = [3 + sum(rows.counts[:i]) for i in range(len(rows.counts))]
    with torch.inference_mode():
        expected = steps.decoder.draft(steps.inputs(rows), hidden[3:], cache)
        found = steps.graphs(other).draft(rows, hidden, firsts)
    assert_same(valid_rows(found.hidden, found.firsts, rows.counts), expected)
