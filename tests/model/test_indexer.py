"""The lightning indexer against its formula in float64, and against everything it is easily mistaken for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.indexer
from model.checkpoint import Weights
from model.config import ModelConfig
from model.indexer import Indexer
from model.inputs import ForwardInputs
from model.pages import LayerPages, PageCache, PageFormat
from model.rope import rope_angles, rope_frequencies
from tests.checkpoints import facts
from tests.running import num_pages_for, selection_mask

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, HEADS, DIM, ROPE, TOPK, WIDTH = 150, 16, 64, 32, 24, 48
CONFIG = ModelConfig.model_validate(
    facts(
        hidden_size=WIDTH,
        index_n_heads=HEADS,
        index_head_dim=DIM,
        qk_rope_head_dim=ROPE,
        index_topk=TOPK,
        rope_theta=1000.0,
    )
)
HALVES = [(i, i + ROPE // 2) for i in range(ROPE // 2)]
NEIGHBOURS = [(2 * i, 2 * i + 1) for i in range(ROPE // 2)]


@dataclass(frozen=True)
class Given:
    """What an indexer is given for one sequence: projected k [T, D], q [T, H * D], hidden states x [T, W]."""

    k: Tensor
    q: Tensor
    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weights_proj: Tensor

    def indexer(self) -> Indexer:
        weights = Weights(
            {
                "i.k_norm.weight": self.norm_weight,
                "i.k_norm.bias": self.norm_bias,
                "i.weights_proj.weight": self.weights_proj,
            }
        )
        return Indexer(CONFIG, weights, "i", "reference")


@pytest.fixture
def given() -> Given:
    generator = torch.Generator().manual_seed(4)
    randn = partial(torch.randn, generator=generator)
    # Keys and queries have a mean, so that it matters whether the norm takes it away.
    return Given(
        k=randn(LENGTH, DIM) + randn(LENGTH, 1),
        q=randn(LENGTH, HEADS * DIM) + 0.5,
        x=randn(LENGTH, WIDTH),
        norm_weight=1 + 0.3 * randn(DIM),
        norm_bias=0.5 * randn(DIM),
        weights_proj=randn(HEADS, WIDTH) * WIDTH**-0.5,
    )


def turn(v: Tensor, pairs: list[tuple[int, int]], first: int = 0) -> Tensor:
    """RoPE of [T, H, D] in float64: channels first + pair, pair i by position * theta^(-2 i / R)."""
    out = v.double().clone()
    positions = torch.arange(len(v)).double()
    for i, (a, b) in enumerate(pairs):
        angle = (positions * CONFIG.rope_theta ** (-2 * i / ROPE)).unsqueeze(1)
        x, y = v[..., first + a].double(), v[..., first + b].double()
        out[..., first + a] = x * angle.cos() - y * angle.sin()
        out[..., first + b] = x * angle.sin() + y * angle.cos()
    return out


def layer_norm(k: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = k - k.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def rms_norm(k: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return k / (k.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def relu_then_weigh(dots: Tensor, weights: Tensor) -> Tensor:
    return (dots.relu() * weights.unsqueeze(-1)).sum(1)


def index_scores(
    given: Given,
    *,
    norm: Callable[[Tensor, Tensor, Tensor], Tensor] = layer_norm,
    pairs: list[tuple[int, int]] = HALVES,
    first: int = 0,
    combine: Callable[[Tensor, Tensor], Tensor] = relu_then_weigh,
) -> Tensor:
    """[T, keys] float64, -inf where a row does not see a key; other arguments make other, wrong indexers."""
    k = turn(norm(given.k.double(), given.norm_weight, given.norm_bias).unsqueeze(1), pairs, first).squeeze(1)
    q = turn(given.q.unflatten(-1, (HEADS, DIM)), pairs, first)
    weights = F.linear(given.x.double(), given.weights_proj.double()) * HEADS**-0.5
    scores = combine(torch.einsum("thd,ld->thl", q, k) * DIM**-0.5, weights)
    return scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))


def best(scores: Tensor) -> Tensor:
    """[T, keys] bool: the TOPK best of each row, as far as there are as many."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(TOPK).indices, True)
    return chosen & torch.ones(LENGTH, LENGTH).tril().bool()


def select(
    given: Given, page_format: PageFormat = "full", pages: LayerPages | None = None
) -> tuple[Tensor, LayerPages]:
    """What the indexer selects, [T, TOPK], when it is given everything in one pass."""
    inputs = ForwardInputs.build([[0] * LENGTH], [0], [[2, 0, 3]])
    if pages is None:
        pages = PageCache(CONFIG, 4, page_format, torch.float32, backend="reference").layers[0]
    angles = rope_angles(rope_frequencies(CONFIG), inputs.positions)
    indexer = given.indexer()
    indexer.write_keys(given.k, inputs, angles, pages)
    queries = indexer.queries(given.x, given.q, angles, pages)
    return indexer.select(queries, 0, inputs, pages), pages


def test_selects_by_the_formula(given: Given) -> None:
    selected, _ = select(given)
    assert torch.equal(selection_mask(selected, LENGTH), best(index_scores(given)))


MISTAKES: dict[str, Callable[[Given], Tensor]] = {
    "rope interleaved as MLA's": lambda given: best(index_scores(given, pairs=NEIGHBOURS)),
    "rope last as MLA's": lambda given: best(index_scores(given, first=DIM - ROPE)),
    "keys without their bias": lambda given: best(index_scores(replace(given, norm_bias=torch.zeros(DIM)))),
    "keys under RMSNorm": lambda given: best(index_scores(given, norm=rms_norm)),
    "head weights inside the relu": lambda given: best(
        index_scores(given, combine=lambda dots, w: (dots * w.unsqueeze(-1)).relu().sum(1))
    ),
    "no relu": lambda given: best(
        index_scores(given, combine=lambda dots, w: (dots * w.unsqueeze(-1)).sum(1))
    ),
    "head weights unsigned": lambda given: best(
        index_scores(given, combine=lambda dots, w: relu_then_weigh(dots, w.abs()))
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_selects_otherwise_than_by(given: Given, mistake: str) -> None:
    """The formula's test could tell: on the same input each mistake changes many of the choices."""
    ours, theirs = selection_mask(select(given)[0], LENGTH), MISTAKES[mistake](given)
    choosing = slice(2 * TOPK, None)
    overlap = (ours & theirs)[choosing].sum() / ours[choosing].sum()
    assert overlap < 0.9


def test_filler_never_wins_over_negative_scores(given: Given) -> None:
    """Every score below zero: what a row does not see, or a slot left at 0, must not look better."""
    negative = replace(given, x=given.x.abs(), weights_proj=-given.weights_proj.abs())
    scores = index_scores(negative)
    visible = scores > float("-inf")
    assert (scores[visible] < 0).double().mean() > 0.99  # the rest is 0: all heads clipped
    selected, _ = select(negative)
    positions = torch.arange(LENGTH).unsqueeze(1)
    assert (selected <= positions).all()
    assert torch.equal((selected >= 0).sum(-1), (positions.squeeze(1) + 1).clamp_max(TOPK))
    assert torch.equal(selection_mask(selected, LENGTH), best(scores))


def test_rows_that_see_few_keys_select_them_all_in_order(given: Given) -> None:
    selected, _ = select(given)
    for row in range(LENGTH):
        chosen = [position for position in selected[row].tolist() if position >= 0]
        assert chosen == sorted(set(chosen))
        assert selected[row, len(chosen) :].tolist() == [-1] * (TOPK - len(chosen))
        if row < TOPK:
            assert chosen == list(range(row + 1))


def test_the_current_token_is_eligible_and_not_forced(given: Given) -> None:
    selected, _ = select(given)
    itself = (selected == torch.arange(LENGTH).unsqueeze(1)).any(-1)[TOPK:]
    assert itself.any()
    assert not itself.all()


def test_tiles_of_rows_change_nothing(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = select(given)
    monkeypatch.setattr(model.indexer, "_TILE_SCORES", 7 * LENGTH)
    assert torch.equal(select(given)[0], whole)


def test_other_sequences_are_not_seen(given: Given) -> None:
    """Two sequences in one batch select as each would alone, and never each other's keys."""
    other = replace(given, k=given.k.flip(0), q=given.q.flip(0), x=given.x.flip(0))
    inputs = ForwardInputs.build([[0] * LENGTH] * 2, [0, 0], [[6, 1, 4], [3, 5, 0]])
    assert num_pages_for(LENGTH) == 3
    pages = PageCache(CONFIG, 7, "full", torch.float32, backend="reference").layers[0]
    angles = rope_angles(rope_frequencies(CONFIG), inputs.positions)
    indexer = given.indexer()
    indexer.write_keys(torch.cat([given.k, other.k]), inputs, angles, pages)
    x, q = torch.cat([given.x, other.x]), torch.cat([given.q, other.q])
    queries = indexer.queries(x, q, angles, pages)
    for sequence, alone in enumerate((given, other)):
        selected = indexer.select(queries, sequence, inputs, pages)
        assert torch.equal(selection_mask(selected, LENGTH), best(index_scores(alone)))


def test_fp8_scores_are_the_formula_s_but_for_rounding(given: Given) -> None:
    """Rotation and scales must cancel: e4m3 leaves a few percent of the scores' spread."""
    _, pages = select(given, "fp8")
    inputs = ForwardInputs.build([[0] * LENGTH], [0], [[2, 0, 3]])
    angles = rope_angles(rope_frequencies(CONFIG), inputs.positions)
    queries = given.indexer().queries(given.x, given.q, angles, pages)
    keys, key_scales = pages.read_index_keys(torch.tensor([2, 0, 3]))
    assert key_scales is not None
    dots = torch.einsum("thd,ld->thl", queries.vectors.double(), keys[:LENGTH].double())
    scores = relu_then_weigh(dots, queries.weights.double()) * key_scales[:LENGTH]
    exact = index_scores(given)
    visible = exact > float("-inf")
    error = (scores - exact)[visible].square().mean().sqrt() / exact[visible].std()
    assert 0.001 < error < 0.06  # measured 0.039


def test_fp8_selects_nearly_the_same(given: Given) -> None:
    exact, quantised = (selection_mask(select(given, f)[0], LENGTH) for f in ("full", "fp8"))
    assert torch.equal(quantised.sum(-1), exact.sum(-1))
    recall = (exact & quantised)[TOPK:].sum() / exact[TOPK:].sum()
    assert 0.93 < recall < 1  # measured 0.974
