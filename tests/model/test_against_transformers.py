"""The model against an implementation by others: `transformers.DeepseekV32ForCausalLM`, eager, float32.

Logits of all positions and the keys that every layer selects, for prompts around and beyond index_topk, cut
into chunks of several sizes. transformers sees each prompt whole and without a cache.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV32ForCausalLM

from model.decoder import Decoder
from model.inputs import ForwardInputs
from tests.checkpoints import DEMO, YARN, facts, write_checkpoint
from tests.running import (
    Run,
    demo,
    load_decoder,
    lookup_documents,
    new_cache,
    num_pages_for,
    run,
    run_pass,
    selection_mask,
)

MAX_LOGIT_DIFFERENCE = 2e-5  # of random checkpoints, logits up to 5; measured 4.3e-6
MAX_DEMO_LOGIT_DIFFERENCE = 2e-4  # logits up to 30; measured 3.9e-5

NEW_YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


def new_keys(rope_parameters: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """A `config.json` as transformers 5 writes it: RoPE in one object of its own."""
    old_keys = "rope_theta", "rope_scaling"
    kept = {key: value for key, value in facts(**overrides).items() if key not in old_keys}
    return {**kept, "rope_parameters": rope_parameters}


SHAPES: dict[str, dict[str, Any]] = {
    "plain": facts(),
    # YaRN under the old keys; two groups of which one stays; the whole index head rotated.
    "yarn_old_keys": facts(
        rope_scaling=YARN,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=3,
        index_head_dim=16,
        index_n_heads=8,
        index_topk=16,
    ),
    # YaRN under the keys of transformers 5; eight groups; two dense layers of four.
    "yarn_new_keys": new_keys(
        NEW_YARN,
        num_hidden_layers=4,
        first_k_dense_replace=2,
        n_routed_experts=32,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        routed_scaling_factor=1.5,
    ),
    # Widths with no large power of two in them, two shared experts, weights that are not normalised, another
    # epsilon (which the norms of the latents and of the index key do not take over).
    "odd_widths": facts(
        rms_norm_eps=1e-4,
        vocab_size=211,
        hidden_size=90,
        intermediate_size=77,
        moe_intermediate_size=31,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=3,
        num_experts_per_tok=5,
        norm_topk_prob=False,
        routed_scaling_factor=0.7,
        q_lora_rank=37,
        kv_lora_rank=130,
        qk_nope_head_dim=14,
        qk_rope_head_dim=6,
        v_head_dim=22,
        index_n_heads=5,
        index_head_dim=18,
        index_topk=24,
    ),
    # Groups of two, no dense layer, rope_parameters without YaRN, index heads eight times as wide as RoPE.
    "no_dense_layer": new_keys(
        {"rope_type": "default", "rope_theta": 1e6},
        first_k_dense_replace=0,
        num_hidden_layers=2,
        n_group=8,
        topk_group=2,
        num_experts_per_tok=2,
        qk_rope_head_dim=8,
        index_head_dim=64,
        index_n_heads=16,
        index_topk=48,
    ),
    # Two index heads: a quarter of all scores is exactly 0, so that genuine ties at the boundary abound.
    "many_ties": facts(index_n_heads=2, index_topk=20, rope_scaling=YARN),
}

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS: dict[str, Callable[[int], int]] = {
    "1": lambda k: 1,
    "k-1": lambda k: k - 1,
    "k": lambda k: k,
    "k+1": lambda k: k + 1,
    "4k": lambda k: 4 * k,
}


@dataclass
class Selections:
    """What transformers' indexers select in one pass, held against what ours selected.

    Where several keys have the same score at the boundary, nothing says which of them are selected (see
    `kernels/topk.py`). On such rows, and only after the scores have shown it, the pass goes on with our
    choice: otherwise a tie in one layer would make everything above it incomparable.

    Attributes:
        ours: [L, T, keys] bool.
        exact_ties: rows where the keys that one side has and the other lacks score the same in float64.
        near_ties: rows where they lie within the rounding of float32.
        wrong: all other rows that differ, in words.
    """

    ours: Tensor
    exact_ties: int = 0
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)

    def hook(self, layer: int, indexer: nn.Module, args: tuple[Any, ...], theirs: Tensor) -> Tensor | None:
        hidden, q_latent, (cos, sin) = args[:3]
        positions = torch.arange(hidden.shape[1])
        causal = positions <= positions.unsqueeze(1)
        mask, ours = selection_mask(theirs[0], len(positions)) & causal, self.ours[layer]
        differs = (mask != ours).any(-1)
        if not differs.any():
            return None
        scores, rounding = exact_index_scores(indexer, hidden[0], q_latent[0], cos[0], sin[0])
        replaced = theirs.clone()
        for row in differs.nonzero().flatten().tolist():
            swapped = scores[row][mask[row] ^ ours[row]]
            gap = float(swapped.max() - swapped.min())
            alike = mask[row].sum() == ours[row].sum() and not (ours[row] & ~causal[row]).any()
            if not alike or gap > rounding[row]:
                self.wrong.append(f"layer {layer} row {row}: {len(swapped)} keys, scores {gap:g} apart")
                continue
            self.exact_ties += gap == 0
            self.near_ties += gap > 0
            replaced[0, row] = ours[row].nonzero().flatten()
        return replaced


def exact_index_scores(
    indexer: nn.Module, hidden: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """[T, keys] index scores in float64, and [T] how far float32 may put two equal ones apart."""

    def turn(x: Tensor) -> Tensor:
        half = indexer.qk_rope_head_dim // 2
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        c, s = cos[:, None, :half].double(), sin[:, None, :half].double()
        return torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1)

    q = F.linear(q_latent.double(), indexer.wq_b.weight.double()).unflatten(-1, (indexer.n_heads, -1))
    k = F.linear(hidden.double(), indexer.wk.weight.double())
    norm = indexer.k_norm
    k = F.layer_norm(k, k.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)
    q, k = turn(q), turn(k.unsqueeze(1)).squeeze(1)
    weights = F.linear(hidden.double(), indexer.weights_proj.weight.double())
    weights = weights * indexer.n_heads**-0.5 * indexer.head_dim**-0.5
    scores = torch.einsum("th,thl->tl", weights, torch.einsum("thd,ld->thl", q, k).relu())
    largest = (weights.abs() * q.norm(dim=-1)).sum(-1) * k.norm(dim=-1).max()
    return scores, largest * 8 * torch.finfo(torch.float32).eps


class Theirs:
    """transformers' model of one checkpoint directory."""

    def __init__(self, directory: Path) -> None:
        self.model, loading = DeepseekV32ForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        assert not any(loading.values()), f"transformers reads other tensors than we do: {loading}"
        self.model.eval()

    @torch.no_grad()
    def run(self, token_ids: list[int], ours: Tensor) -> tuple[Tensor, Selections]:
        """[T, vocab] logits, given [L, T, index_topk] selections to hold against."""
        selections = Selections(selection_mask(ours, len(token_ids)))
        handles = [
            layer.self_attn.indexer.register_forward_hook(partial(selections.hook, number))
            for number, layer in enumerate(self.model.model.layers)
        ]
        try:
            logits = self.model(torch.tensor([token_ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits, selections


@dataclass(frozen=True)
class Agreement:
    """How far a run of ours lies from theirs.

    Attributes:
        logits: the largest difference over all positions and tokens of the vocabulary.
        choosing: rows, over all layers, that see more keys than they may select.
        exact_ties, near_ties: how many of those were decided by a tie.
    """

    logits: float
    choosing: int
    exact_ties: int
    near_ties: int


def compare(ours: Decoder, theirs: Theirs, token_ids: list[int], chunk: int | None) -> Agreement:
    return judge(run(ours, token_ids, chunk=chunk), theirs, token_ids)


def judge(ours: Run, theirs: Theirs, token_ids: list[int]) -> Agreement:
    logits, selections = theirs.run(token_ids, ours.selected)
    assert not selections.wrong, f"{len(selections.wrong)} rows: {selections.wrong[:5]}"
    num_layers, num_tokens, index_topk = ours.selected.shape
    choosing = num_layers * max(0, num_tokens - index_topk)
    difference = float((ours.logits - logits).abs().max())
    return Agreement(difference, choosing, selections.exact_ties, selections.near_ties)


def random_tokens(vocab_size: int, num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(vocab_size, (num_tokens,), generator=generator).tolist()


Pairs = Callable[[str], tuple[Decoder, Theirs]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Both models of a random checkpoint of one of SHAPES, made when first asked for."""

    @cache
    def pair(shape: str) -> tuple[Decoder, Theirs]:
        directory = tmp_path_factory.mktemp(shape)
        write_checkpoint(directory, SHAPES[shape], seed=list(SHAPES).index(shape))
        return load_decoder(directory), Theirs(directory)

    return pair


@pytest.mark.parametrize("chunk", [1, 7, 64, None], ids=["by 1", "by 7", "by 64", "whole"])
@pytest.mark.parametrize("prompt", list(PROMPTS))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_random_checkpoint(pairs: Pairs, shape: str, prompt: str, chunk: int | None) -> None:
    ours, theirs = pairs(shape)
    tokens = random_tokens(ours.config.vocab_size, PROMPTS[prompt](ours.config.index_topk))
    agreement = compare(ours, theirs, tokens, chunk)
    assert agreement.logits <= MAX_LOGIT_DIFFERENCE
    assert agreement.near_ties <= max(1, agreement.choosing // 100)


def test_exact_ties_are_met(pairs: Pairs) -> None:
    """That ties go by the scores is itself tested: both sides choose differently on many rows."""
    ours, theirs = pairs("many_ties")
    tokens = random_tokens(ours.config.vocab_size, 4 * ours.config.index_topk)
    agreement = compare(ours, theirs, tokens, chunk=None)
    assert 0.05 * agreement.choosing < agreement.exact_ties < 0.5 * agreement.choosing


def test_a_wrong_selection_is_not_taken_for_a_tie(pairs: Pairs) -> None:
    """The comparison must be able to fail: one key of one row exchanged for one that was not selected."""
    ours, theirs = pairs("plain")
    tokens = random_tokens(ours.config.vocab_size, 100)
    selected = run(ours, tokens).selected.clone()
    unselected = set(range(100)) - set(selected[1, 99].tolist())
    selected[1, 99, 5] = max(unselected)
    _, selections = theirs.run(tokens, selected)
    assert [text.split(":")[0] for text in selections.wrong] == ["layer 1 row 99"]


def run_together(decoder: Decoder, sequences: list[list[int]], steps: list[list[int]]) -> list[Run]:
    """Run sequences as ragged batches, `steps[pass][sequence]` tokens a pass, on pages dealt by chance."""
    counts = [num_pages_for(len(tokens)) for tokens in sequences]
    cache = new_cache(decoder, 2 * sum(counts))
    order = torch.randperm(cache.num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    pages = [[order.pop() for _ in range(count)] for count in counts]
    done = [0] * len(sequences)
    parts: list[list[Run]] = [[] for _ in sequences]
    for step in steps:
        present = [number for number, count in enumerate(step) if count]
        inputs = ForwardInputs.build(
            [sequences[n][done[n] : done[n] + step[n]] for n in present],
            [done[n] for n in present],
            [pages[n][: num_pages_for(done[n] + step[n])] for n in present],
        )
        batch = run_pass(decoder, inputs, cache)
        for n, segment in zip(present, inputs.segments, strict=True):
            parts[n].append(batch.rows(segment.start, segment.stop))
            done[n] += step[n]
    assert done == [len(tokens) for tokens in sequences]
    return [Run.join(of_one) for of_one in parts]


# Prompts of every kind beside each other and beside single decoded tokens; the context of one never leaves
# index_topk (48), others cross it within a pass and between passes.
RAGGED_LENGTHS = [1, 40, 192, 130, 65, 49]
RAGGED_STEPS = [
    [1, 30, 100, 0, 47, 17],
    [0, 9, 90, 66, 1, 17],
    [0, 1, 1, 63, 16, 14],
    [0, 0, 1, 1, 1, 1],
]


@pytest.mark.parametrize("shape", ["no_dense_layer", "yarn_new_keys"])
def test_ragged_batch(pairs: Pairs, shape: str) -> None:
    ours, theirs = pairs(shape)
    vocab_size = ours.config.vocab_size
    sequences = [random_tokens(vocab_size, num_tokens) for num_tokens in RAGGED_LENGTHS]
    for tokens, together in zip(sequences, run_together(ours, sequences, RAGGED_STEPS), strict=True):
        assert judge(together, theirs, tokens).logits <= MAX_LOGIT_DIFFERENCE


def test_a_sequence_in_a_batch_equals_the_sequence_alone(pairs: Pairs) -> None:
    ours, _ = pairs("no_dense_layer")  # the shape of most index heads: no ties on these tokens
    sequences = [random_tokens(ours.config.vocab_size, num_tokens) for num_tokens in RAGGED_LENGTHS]
    for tokens, together in zip(sequences, run_together(ours, sequences, RAGGED_STEPS), strict=True):
        alone = run(ours, tokens)
        assert torch.equal(together.selected, alone.selected)
        torch.testing.assert_close(together.logits, alone.logits, rtol=0, atol=MAX_LOGIT_DIFFERENCE)


@pytest.fixture(scope="module")
def dequantized_demo(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """transformers on the demo's FP8 weights, widened here and not by the code under test; no MTP layer."""
    directory = tmp_path_factory.mktemp("demo")
    config = json.loads((DEMO / "config.json").read_text())
    mtp_layer = f"model.layers.{config['num_hidden_layers']}."
    weight_map = json.loads((DEMO / "model.safetensors.index.json").read_text())["weight_map"]
    stored: dict[str, Tensor] = {}
    for file in set(weight_map.values()):
        with safe_open(DEMO / file, framework="pt") as shard:
            stored.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    widened = {
        name: widen(tensor, stored.get(f"{name}_scale_inv"))
        for name, tensor in stored.items()
        if not name.startswith(mtp_layer) and not name.endswith("_scale_inv")
    }
    save_file(widened, directory / "model.safetensors", {"format": "pt"})
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    return Theirs(directory)


def widen(tensor: Tensor, scales: Tensor | None) -> Tensor:
    tensor = tensor.float()
    if scales is not None:
        for row, scale_row in enumerate(scales.tolist()):
            for column, scale in enumerate(scale_row):
                tensor[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] *= scale
    return tensor


DEMO_PROMPTS = [("k-1", None), ("k", 64), ("k+1", 7), ("4k", 64), ("4k", None)]


@pytest.mark.parametrize(("prompt", "chunk"), DEMO_PROMPTS)
def test_demo(dequantized_demo: Theirs, prompt: str, chunk: int | None) -> None:
    num_tokens = PROMPTS[prompt](demo().config.index_topk)
    long_enough = [document for document in lookup_documents() if len(document) >= num_tokens]
    tokens = long_enough[DEMO_PROMPTS.index((prompt, chunk))][:num_tokens]
    agreement = compare(demo(), dequantized_demo, tokens, chunk)
    assert agreement.logits <= MAX_DEMO_LOGIT_DIFFERENCE
    assert agreement.near_ties <= agreement.choosing // 100
