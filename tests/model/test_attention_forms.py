"""Attention runs in several forms over two page formats: they are one function.

Expanded or absorbed, selected keys or all of them, a prompt whole or token by token, on whatever pages: the
numbers agree up to the rounding of float32, and are equal bit by bit where nothing but an address changed.
"""

import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import model.attention
from kernels.sparse_mla import sparse_mla
from model.attention import expanded_pays, slots_of_positions
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.decoder import Decoder
from model.inputs import PAGE_SIZE, ForwardInputs
from model.pages import LayerPages, PageCache, PageFormat
from model.rope import rope_angles, rope_frequencies
from tests import e4m3
from tests.checkpoints import facts, write_checkpoint
from tests.running import build_decoder, new_cache, num_pages_for, run

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX_TOPK = 32
LENGTH = 200  # four pages, the last one part full; far beyond index_topk
ROUNDING = 2e-5  # of logits up to 5 after three layers; measured 4e-6
FORMATS: list[PageFormat] = ["full", "fp8"]

# 16 index heads: all of them clipped to zero at once, a tie, does not happen on these tokens.
SHAPE = facts(index_topk=INDEX_TOPK, index_n_heads=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("forms"), SHAPE))


@pytest.fixture(scope="module")
def sparse(checkpoint: Checkpoint) -> Decoder:
    return build_decoder(checkpoint, checkpoint.load(dtype=torch.float32), "sparse")


@pytest.fixture(scope="module")
def dense(checkpoint: Checkpoint) -> Decoder:
    return build_decoder(checkpoint, checkpoint.load(dtype=torch.float32), "dense")


@pytest.fixture
def tokens() -> list[int]:
    """Chosen so that no row has its last selected key within 1e-4 of the next: no rounding flips a choice."""
    return torch.randint(320, (LENGTH,), generator=torch.Generator().manual_seed(14)).tolist()


@pytest.fixture
def forms_used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the attention operations that have run."""
    used: set[str] = set()

    def spied(name: str) -> Callable[..., Tensor]:
        operation = getattr(model.attention, name)

        def call(*args: object, **kwargs: object) -> Tensor:
            used.add(name)
            return operation(*args, **kwargs)

        return call

    for name in ("dense_mla", "sparse_mla", "masked_mha"):
        monkeypatch.setattr(model.attention, name, spied(name))
    return used


def force(monkeypatch: pytest.MonkeyPatch, decoder: Decoder, form: str) -> None:
    """Make every sequence run expanded, or every one absorbed, whatever its length."""
    monkeypatch.setattr(model.attention, "MIN_EXPANDED_ROWS", 1 if form == "expanded" else LENGTH + 1)
    monkeypatch.setattr(model.attention, "expanded_pays", lambda *_: True)


def attend(decoder: Decoder, num_context: int, num_rows: int, page_format: PageFormat) -> Tensor:
    """[num_rows, D] of one layer's attention to random rows, after `num_context` others in a first pass."""
    config = decoder.config
    num_tokens = num_context + num_rows
    x = torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(3))
    page_ids = list(range(num_pages_for(num_tokens)))
    pages = new_cache(decoder, len(page_ids), page_format).layers[1]
    out = torch.empty(0)
    for start, stop in ((0, num_context), (num_context, num_tokens)):
        inputs = ForwardInputs.build([[0] * (stop - start)], [start], [page_ids])
        angles = rope_angles(rope_frequencies(config), inputs.positions)
        out = decoder.layers[1].attention.forward(x[start:stop], inputs, angles, pages)
    return out


@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize(
    ("mode", "num_context", "num_rows", "absorbed_form"),
    [
        ("sparse", 10, 1, "dense_mla"),
        ("sparse", 10, 20, "dense_mla"),
        ("sparse", 10, 100, "sparse_mla"),
        ("sparse", 100, 1, "sparse_mla"),
        ("sparse", 100, 20, "sparse_mla"),
        ("dense", 100, 1, "dense_mla"),
        ("dense", 100, 100, "dense_mla"),
    ],
)
def test_absorbed_equals_expanded(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    forms_used: set[str],
    mode: str,
    num_context: int,
    num_rows: int,
    absorbed_form: str,
    page_format: PageFormat,
) -> None:
    decoder: Decoder = request.getfixturevalue(mode)
    force(monkeypatch, decoder, "expanded")
    expanded = attend(decoder, num_context, num_rows, page_format)
    assert forms_used == {"masked_mha"}
    forms_used.clear()
    force(monkeypatch, decoder, "absorbed")
    absorbed = attend(decoder, num_context, num_rows, page_format)
    assert absorbed_form in forms_used
    assert "masked_mha" not in forms_used
    torch.testing.assert_close(absorbed, expanded, rtol=0, atol=2e-6)
    assert expanded.abs().max() > 0.1


def test_the_whole_model_expanded_equals_absorbed(
    monkeypatch: pytest.MonkeyPatch, sparse: Decoder, tokens: list[int]
) -> None:
    force(monkeypatch, sparse, "expanded")
    expanded = run(sparse, tokens)
    force(monkeypatch, sparse, "absorbed")
    absorbed = run(sparse, tokens)
    assert torch.equal(absorbed.selected, expanded.selected)
    torch.testing.assert_close(absorbed.logits, expanded.logits, rtol=0, atol=ROUNDING)


def test_each_length_runs_in_its_form(sparse: Decoder, forms_used: set[str], tokens: list[int]) -> None:
    """What the configuration chooses when nothing is forced."""

    def forms_of(num_tokens: int, chunk: int | None = None) -> set[str]:
        forms_used.clear()
        run(sparse, tokens[:num_tokens], chunk=chunk)
        return set(forms_used)

    assert forms_of(10) == {"dense_mla"}
    assert forms_of(30) == {"masked_mha"}
    limit = max(n for n in range(1, LENGTH) if expanded_pays(sparse.config, n, n))
    assert sparse.config.index_topk < limit < LENGTH - 1
    assert forms_of(limit) == {"masked_mha"}
    assert forms_of(limit + 1) == {"sparse_mla"}
    assert forms_of(33, chunk=1) == {"dense_mla", "sparse_mla"}


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [1, 13, 64, 150])
def test_prefill_equals_decode(
    request: pytest.FixtureRequest, mode: str, chunk: int, tokens: list[int]
) -> None:
    decoder: Decoder = request.getfixturevalue(mode)
    caches = [new_cache(decoder, num_pages_for(LENGTH)) for _ in range(2)]
    whole = run(decoder, tokens, cache=caches[0])
    parts = run(decoder, tokens, chunk=chunk, cache=caches[1])
    assert torch.equal(parts.selected, whole.selected)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=ROUNDING)
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(ours.latents, theirs.latents, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(ours.index_keys, theirs.index_keys, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("chunk", [1, 16, None])
def test_sparse_is_dense_up_to_index_topk(
    sparse: Decoder, dense: Decoder, page_format: PageFormat, chunk: int | None, tokens: list[int]
) -> None:
    prompt = tokens[:INDEX_TOPK]
    chosen = run(sparse, prompt, chunk=chunk, page_format=page_format)
    everything = run(dense, prompt, chunk=chunk, page_format=page_format)
    assert torch.equal(chosen.logits, everything.logits)
    assert torch.equal(chosen.selected, everything.selected)


def test_sparse_leaves_dense_beyond_index_topk(sparse: Decoder, dense: Decoder, tokens: list[int]) -> None:
    chosen, everything = run(sparse, tokens), run(dense, tokens)
    difference = (chosen.logits - everything.logits).abs().amax(-1)
    assert difference[:INDEX_TOPK].max() <= ROUNDING
    assert difference[INDEX_TOPK + 8 :].min() > 0.05  # the first rows beyond drop few keys of little weight


def test_selecting_everything_is_dense(tmp_path: Path, dense: Decoder, tokens: list[int]) -> None:
    """Rows that select all they see, by scores and through the gather, equal rows that select nothing."""
    wide = Checkpoint.open(write_checkpoint(tmp_path, {**SHAPE, "index_topk": LENGTH - 1}))
    decoder = build_decoder(wide, wide.load(dtype=torch.float32))
    with pytest.MonkeyPatch.context() as monkeypatch:
        force(monkeypatch, decoder, "absorbed")
        chosen = run(decoder, tokens)
    everything = run(dense, tokens)
    assert (chosen.selected[:, -1] >= 0).sum(-1).tolist() == [LENGTH - 1] * 3
    torch.testing.assert_close(chosen.logits[:-1], everything.logits[:-1], rtol=0, atol=ROUNDING)


def poisoned_cache(decoder: Decoder, num_pages: int, page_format: PageFormat) -> PageCache:
    """Pages in which everything is NaN, so that whatever is read unwritten shows in the logits."""
    cache = new_cache(decoder, num_pages, page_format)
    poison = 0xFF if page_format == "fp8" else float("nan")  # the byte is NaN in e4m3, bf16 and fp32
    for layer in cache.layers:
        layer.latents.fill_(poison)
        layer.index_keys.fill_(poison)
    return cache


@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("chunk", [1, 50, None])
def test_pages_may_lie_anywhere(
    sparse: Decoder, page_format: PageFormat, chunk: int | None, tokens: list[int]
) -> None:
    """Bit for bit, without a look at what is not the sequence's own, or a change of it."""
    in_order = run(sparse, tokens, chunk=chunk, page_format=page_format)
    pages = [9, 0, 12, 5]
    cache = poisoned_cache(sparse, 14, page_format)
    before = [layer.latents.clone() for layer in cache.layers]
    scattered = run(sparse, tokens, chunk=chunk, cache=cache, pages=pages)
    assert torch.equal(scattered.selected, in_order.selected)
    assert torch.equal(scattered.logits, in_order.logits)
    written = torch.zeros(14 * PAGE_SIZE, dtype=torch.bool)
    written[torch.tensor(pages).unsqueeze(1) * PAGE_SIZE + torch.arange(PAGE_SIZE)] = True
    written[pages[-1] * PAGE_SIZE + LENGTH % PAGE_SIZE : (pages[-1] + 1) * PAGE_SIZE] = False
    for layer, untouched in zip(cache.layers, before, strict=True):
        changed = layer.latents.view(torch.uint8) != untouched.view(torch.uint8)
        assert torch.equal(changed.flatten(0, 1).any(-1), written)


@pytest.mark.parametrize("page_format", FORMATS)
def test_a_skipped_slot_is_not_read(sparse: Decoder, page_format: PageFormat, tokens: list[int]) -> None:
    """Rows that see fewer keys than they may select, while page 0 is somebody else's and holds NaN."""
    cache = poisoned_cache(sparse, 5, page_format)
    assert run(sparse, tokens, cache=cache, pages=[4, 3, 2, 1]).logits.isfinite().all()


def test_slots_of_positions() -> None:
    page_row = torch.tensor([7, 0, 3])
    positions = torch.tensor([[0, 63, 64], [130, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    expected = [[448, 511, 0], [194, -1, -1], [-1, -1, -1]]
    assert slots_of_positions(positions, page_row).tolist() == expected


def test_skipped_slots_count_for_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(50, 12, generator=generator)
    q = torch.randn(3, 2, 12, generator=generator)

    def attend_to(slots: list[list[int]]) -> Tensor:
        gather = partial(torch.index_select, latents, 0)
        return sparse_mla(q, gather, torch.tensor(slots), 0.3, 8, backend="reference")

    exact = attend_to([[4, 9, 30]] * 3)
    torch.testing.assert_close(attend_to([[-1, 4, -1, 9, 30, -1]] * 3), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(attend_to([[30, 4, 9]] * 3), exact, rtol=0, atol=1e-6)
    assert torch.equal(attend_to([[4, 9, 30], [-1, -1, -1], [4, 9, 30]])[1], torch.zeros(2, 8))
    assert torch.equal(attend_to([[5], [6], [7]]), latents[5:8, None, :8].expand(-1, 2, -1))


def layer_pages(kv_lora_rank: int, rope_dim: int, index_dim: int) -> LayerPages:
    """Two fp8 pages of zeros of a layer of the given widths."""
    config = ModelConfig.model_validate(
        facts(kv_lora_rank=kv_lora_rank, qk_rope_head_dim=rope_dim, index_head_dim=index_dim)
    )
    return PageCache(config, 2, "fp8", torch.float32, backend="reference").layers[0]


def test_bytes_of_a_latent_record() -> None:
    """512 e4m3 values, 4 fp32 scales, 64 bf16: read back with numpy and struct, not with our own code."""
    pages = layer_pages(512, 64, 128)
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(3, 512, generator=generator) * torch.tensor([0.01, 1.0, 30.0]).unsqueeze(1)
    k_pe = torch.randn(3, 64, generator=generator)
    slots = torch.tensor([100, 5, 64])
    pages.write_latents(slots, c, k_pe)

    assert pages.latents.shape == (2, 64, 656)
    for row, slot in enumerate(slots.tolist()):
        record = bytes(pages.latents[slot // 64, slot % 64].tolist())
        scales = struct.unpack("<4f", record[512:528])
        for group, scale in enumerate(scales):
            amax = float(c[row, 128 * group : 128 * (group + 1)].abs().max())
            assert scale == 2.0 ** math.ceil(math.log2(amax / 448))
        scale_of = torch.tensor(scales).repeat_interleave(128)
        stored = torch.tensor([e4m3.VALUES[byte] for byte in record[:512]])
        # Half a step of three mantissa bits, and half the smallest subnormal step.
        bound = (c[row] / scale_of).abs() / 16 + 2.0**-10
        assert ((stored - c[row] / scale_of).abs() <= bound).all()
        as_float = [struct.unpack("<f", b"\0\0" + record[at : at + 2])[0] for at in range(528, 656, 2)]
        assert torch.equal(torch.tensor(as_float), k_pe[row].bfloat16().float())
        expected = torch.cat([stored * scale_of, torch.tensor(as_float)])
        assert torch.equal(pages.read_latents(torch.tensor([slot]))[0], expected)
    untouched = [slot for slot in range(128) if slot not in slots.tolist()]
    assert not pages.latents.flatten(0, 1)[untouched].any()


def test_bytes_of_an_index_page() -> None:
    """Planar: 64 x 128 values, then 64 fp32 scales."""
    pages = layer_pages(512, 64, 128)
    keys = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    # Sylvester's matrix has -1 where the numbers of row and column share an odd count of ones.
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)])
    slots = torch.tensor([100, 5, 64])
    values, scales = pages.encode_index(keys)
    assert scales is not None
    pages.write_index_keys(slots, values, scales)

    assert pages.index_keys.shape == (2, 8448)
    for row, slot in enumerate(slots.tolist()):
        page, offset = bytes(pages.index_keys[slot // 64].tolist()), slot % 64
        (scale,) = struct.unpack_from("<f", page, 8192 + 4 * offset)
        stored = torch.tensor([e4m3.VALUES[byte] for byte in page[128 * offset : 128 * (offset + 1)]])
        rotated = keys[row] @ signs / 128**0.5
        assert scale == 2.0 ** math.ceil(math.log2(float(rotated.abs().max()) / 448))
        # Half a step of three mantissa bits, and half the smallest subnormal step.
        assert ((stored * scale - rotated).abs() <= rotated.abs() / 16 + scale * 2.0**-10).all()
    assert int((pages.index_keys != 0).sum()) <= 3 * (128 + 4)


@pytest.mark.parametrize("chunk", [1, 13, 64])
def test_fp8_pages_hardly_depend_on_the_chunks(sparse: Decoder, chunk: int, tokens: list[int]) -> None:
    """The same tokens leave the same bytes, but where rounding put a value across the edge of a step."""
    whole, parts = (new_cache(sparse, num_pages_for(LENGTH), "fp8") for _ in range(2))
    run(sparse, tokens, cache=whole)
    run(sparse, tokens, chunk=chunk, cache=parts)
    for layer, (one, other) in enumerate(zip(whole.layers, parts.layers, strict=True)):
        for a, b in ((one.latents, other.latents), (one.index_keys, other.index_keys)):
            # Measured: none or one byte in the first layer, up to 0.11 % in the third.
            assert (a != b).float().mean() <= (0.0005 if layer == 0 else 0.01)
        slots = torch.arange(LENGTH)
        a, b = one.read_latents(slots), other.read_latents(slots)
        step = a.abs() / 8 + 2.0**-9  # of e4m3 at a scale of at most 1
        assert ((a - b).abs() <= step).all() or layer > 0
