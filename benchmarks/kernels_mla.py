"""Cases of attention: sparse decode and prefill, dense decode, beside FlashMLA's; expanded prefill."""

import torch
from torch import Tensor

from benchmarks.kernels_inputs import (
    HEADS,
    LATENT,
    PAGE,
    RECORD,
    ROPE,
    SOFTMAX_SCALE,
    TOPK,
    Case,
    Made,
    Peers,
    generator,
    out_of_order_pages,
    randn,
    relative,
)
from kernels.fp8_quant import FP8
from kernels.latent_pages import pack_latents_reference

_WIDTH = LATENT + ROPE
_CONTEXT = 32768
_TOLERANCE = 6e-3  # probabilities and the result are rounded to bf16


def cases() -> list[Case]:
    return [
        *(_sparse_decode(b, n, HEADS) for b, n in ((1, 1), (32, 1), (128, 1), (1, 2), (32, 2), (128, 2))),
        *(_sparse_decode(b, 1, 64) for b in (32, 128)),
        *(_sparse_decode(b, 1, 16) for b in (32, 128)),
        *(_sparse_prefill(keys, heads) for keys, heads in ((32768, HEADS), (65536, HEADS), (65536, 64))),
        *(_dense_decode(b, context) for context in (4096, 32768) for b in (32, 128)),
        *(_expanded(rows, before, choice=False) for rows, before in ((2048, 0), (4096, 0), (4096, 4096))),
        *(_expanded(4096, before, choice=True) for before in (0, 4096)),
    ]


def _flop(num_heads: int, keys: float) -> float:
    """Keys of all queries together."""
    return 2.0 * num_heads * keys * (_WIDTH + LATENT)


def _records(num_slots: int) -> Tensor:
    """[P, 64, 656] uint8."""
    records = torch.empty(num_slots, RECORD, dtype=torch.uint8, device="cuda")
    random = generator()
    for start in range(0, num_slots, 1 << 17):
        rows = records[start : start + (1 << 17)]
        drawn = torch.randn(len(rows), _WIDTH, generator=random, device="cuda")
        rows.copy_(pack_latents_reference(drawn[:, :LATENT], drawn[:, LATENT:]))
    return records.view(-1, PAGE, RECORD)


def _random_slots(num_rows: int, rows_per_sequence: int, context: int) -> Tensor:
    """[T, 2048] int32, distinct in a row, anywhere in the context of the row's sequence."""
    slots = torch.empty(num_rows, TOPK, dtype=torch.int32, device="cuda")
    random = generator()
    for row in range(num_rows):
        chosen = torch.randperm(context, generator=random, device="cuda")[:TOPK]
        slots[row] = chosen + row // rows_per_sequence * context
    return slots


def _sparse_decode(num_sequences: int, n: int, num_heads: int) -> Case:
    num_rows = num_sequences * n

    def make(peers: Peers) -> Made:
        from kernels.sparse_mla_decode import sparse_mla_decode, sparse_mla_decode_reference

        q = randn(num_rows, num_heads, _WIDTH)
        pages = _records(num_sequences * _CONTEXT)
        slots = _random_slots(num_rows, n, _CONTEXT)
        some = torch.tensor([0, num_rows - 1], device="cuda")
        expected = sparse_mla_decode_reference(q[some].float(), pages, slots[some], SOFTMAX_SCALE, LATENT)
        made = Made(
            lambda: sparse_mla_decode(q, pages, slots, SOFTMAX_SCALE, LATENT, backend="triton"),
            lambda out: relative(out.view(num_rows, num_heads, LATENT)[some], expected),
            _TOLERANCE,
        )
        if (mla := peers.flash_mla) is not None and num_heads >= 64:
            metadata, legacy = mla.get_mla_metadata()[0], peers.legacy
            queries = q.view(num_sequences, n, num_heads, _WIDTH)
            cache = pages.view(FP8).view(-1, PAGE, 1, RECORD)
            indices = slots.view(num_sequences, n, TOPK)
            made.peer = lambda: mla.flash_mla_with_kvcache(
                queries, cache, None, None, LATENT, metadata, None, SOFTMAX_SCALE, False, True, indices,
                **legacy,
            )[0]  # fmt: skip
        return made

    at_least, aim = (0.7, 1.0) if num_heads == HEADS and n == 1 else (None, None)
    return Case(
        "sparse_mla_decode",
        f"B{num_sequences} n{n} H{num_heads}",
        _flop(num_heads, num_rows * TOPK),
        num_rows * (TOPK * RECORD + 2 * num_heads * (_WIDTH + LATENT)),
        make,
        at_least,
        aim,
        "bf16",
        ("FlashMLA sparse decode fp8", f"B{num_sequences} s_q{n} H{num_heads} topk2048 of 32768")
        if num_heads >= 64
        else None,  # it pads to 64 heads
    )


def _random_positions(num_rows: int, num_keys: int) -> Tensor:
    """[T, 2048] int32, distinct in a row."""
    random = generator()
    return torch.cat(
        [
            torch.rand(256, num_keys, generator=random, device="cuda").topk(TOPK, sorted=False).indices.int()
            for _ in range(0, num_rows, 256)
        ]
    )


def _sparse_prefill(num_keys: int, num_heads: int, num_rows: int = 4096) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.sparse_mla_prefill import sparse_mla_prefill, sparse_mla_prefill_reference

        q, latents = randn(num_rows, num_heads, _WIDTH), randn(num_keys, _WIDTH)
        positions = _random_positions(num_rows, num_keys)
        some = torch.tensor([0, 1, num_rows // 2, num_rows - 1], device="cuda")
        expected = sparse_mla_prefill_reference(
            q[some].float(), latents.float(), positions[some], SOFTMAX_SCALE, LATENT
        )
        made = Made(
            lambda: sparse_mla_prefill(q, latents, positions, SOFTMAX_SCALE, LATENT, backend="triton"),
            lambda out: relative(out[some], expected),
            _TOLERANCE,
        )
        if (mla := peers.flash_mla) is not None:
            keys, indices, legacy = latents.unsqueeze(1), positions.unsqueeze(1), peers.legacy
            made.peer = lambda: mla.flash_mla_sparse_fwd(q, keys, indices, SOFTMAX_SCALE, LATENT, **legacy)[0]
        return made

    return Case(
        "sparse_mla_prefill",
        f"{num_rows} of {num_keys} H{num_heads}",
        _flop(num_heads, num_rows * TOPK),
        num_rows * (4 * TOPK + 2 * num_heads * (_WIDTH + LATENT)) + 2 * num_keys * _WIDTH,
        make,
        0.65 if num_heads == HEADS else None,
        0.9 if num_heads == HEADS else None,
        "bf16",
        ("FlashMLA sparse prefill", f"Sq{num_rows} SKV{num_keys} H{num_heads} topk2048 random idx"),
    )


def _dense_decode(num_sequences: int, context: int, num_heads: int = HEADS) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.dense_mla_decode import dense_mla_decode

        q = randn(num_sequences, num_heads, _WIDTH)
        page_table = out_of_order_pages(num_sequences, context)
        pages = torch.empty(page_table.numel(), PAGE, _WIDTH, dtype=torch.bfloat16, device="cuda")
        random = generator()
        for some_pages in pages.split(4096):
            some_pages.normal_(generator=random)
        visible = torch.full((num_sequences,), context, dtype=torch.int32, device="cuda")
        latents = pages[page_table[-1].long()].flatten(0, 1).float()
        probabilities = (q[-1].float() @ latents.t() * SOFTMAX_SCALE).softmax(-1)
        expected = probabilities @ latents[:, :LATENT]
        made = Made(
            lambda: dense_mla_decode(
                q,
                pages,
                page_table,
                visible,
                rows_per_sequence=1,
                max_visible=context,
                scale=SOFTMAX_SCALE,
                kv_lora_rank=LATENT,
                backend="triton",
            ),
            lambda out: relative(out.view(num_sequences, num_heads, LATENT)[-1], expected),
            _TOLERANCE,
        )
        if (mla := peers.flash_mla) is not None:
            metadata, legacy = mla.get_mla_metadata()[0], peers.legacy
            queries, cache = q.unsqueeze(1), pages.unsqueeze(2)
            made.peer = lambda: mla.flash_mla_with_kvcache(
                queries, cache, page_table, visible, LATENT, metadata, None, SOFTMAX_SCALE, False, False,
                **legacy,
            )[0]  # fmt: skip
        return made

    keys = num_sequences * context
    return Case(
        "dense_mla_decode",
        f"B{num_sequences} ctx{context} H{num_heads}",
        _flop(num_heads, keys),
        2 * keys * _WIDTH + 2 * num_sequences * num_heads * (_WIDTH + LATENT),
        make,
        0.7,
        0.9,
        "bf16",
        ("FlashMLA dense decode", f"B{num_sequences} ctx{context} s_q1 H{num_heads}"),
    )


def _expanded(num_rows: int, num_before: int, *, choice: bool, num_heads: int = HEADS) -> Case:
    """A chunk of a prompt, causal, operands where the projections leave them; 2,048 keys chosen, or all."""
    nope, value, scale = 128, 128, 192**-0.5
    num_keys = num_before + num_rows
    free = min(max(TOPK - num_before, 0), num_rows) if choice else num_rows  # rows without a choice to make

    def make(peers: Peers) -> Made:
        from kernels.expanded_mha import expanded_mha

        q = randn(num_rows, num_heads, nope + ROPE)
        absorbed, latents = randn(num_rows, num_heads, _WIDTH), randn(num_keys, _WIDTH)
        k_nope, v = randn(num_keys, num_heads, nope + value).split([nope, value], dim=-1)
        q_nope, q_pe, k_pe = q[..., :nope], absorbed[..., LATENT:], latents[:, LATENT:]
        visible = torch.arange(num_before, num_keys, device="cuda") + 1
        selected = _visible_positions(visible[free:], num_keys) if choice else None
        row = num_rows - 1
        seen = torch.arange(num_keys, device="cuda") if selected is None else selected[-1].long()
        scores = torch.einsum("hn,lhn->hl", q_nope[row].float(), k_nope[seen].float())
        scores += q_pe[row].float() @ k_pe[seen].float().t()
        expected = torch.einsum("hl,lhv->hv", (scores * scale).softmax(-1), v[seen].float())
        return Made(
            lambda: expanded_mha(q_nope, q_pe, k_nope, k_pe, v, visible, selected, scale, backend="triton"),
            lambda out: relative(out[row], expected),
            _TOLERANCE,
        )

    pairs = num_rows * num_before + num_rows * (num_rows + 1) / 2
    widths = nope + ROPE + value
    return Case(
        "expanded_mha",
        f"{num_rows} after {num_before}, {'chosen' if choice else 'causal'} H{num_heads}",
        2.0 * num_heads * pairs * widths,
        2.0 * num_heads * (num_rows * (widths + value) + num_keys * (nope + value))
        + 4.0 * (num_rows - free) * TOPK,
        make,
    )


def _visible_positions(visible: Tensor, num_keys: int) -> Tensor:
    """[T, 2048] int32 in order, distinct in a row, of the keys that the row sees."""
    random = generator()
    keys, found = torch.arange(num_keys, device="cuda"), []
    for some in visible.split(256):
        drawn = torch.rand(len(some), num_keys, generator=random, device="cuda")
        drawn.masked_fill_(keys >= some.unsqueeze(1), -1.0)
        found.append(drawn.topk(TOPK, sorted=False).indices.sort(-1).values.int())
    return torch.cat(found)
