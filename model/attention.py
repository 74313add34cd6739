"""Multi-head latent attention with the lightning indexer, over pages.

Every token leaves two things in a layer's pages: the latent c with the shared rotated key k_pe (what
attention reads) and an index key (what the indexer scores). A query then runs in one of three forms that
give the same numbers up to rounding:

    everything visible   context <= index_topk (or dense mode): no selection is needed
    absorbed, sparse     the indexer's choice is gathered by slot; k and v stay latents
    expanded, masked     k and v are expanded once for many queries; the choice is a mask (short prompts)

With the backend `deterministic` every row runs absorbed over index_topk gathered slots, what it lacks of them
skipped, so that nothing in its arithmetic depends on who runs beside it.

Shapes: T rows, H heads, N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, C kv_lora_rank.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kernels.backend import Backend, require
from kernels.dense_mla import dense_mla
from kernels.linear import linear, stable
from kernels.masked_mha import masked_mha
from kernels.norm import rms_norm
from kernels.rope import apply_rope
from kernels.sparse_mla import require_stable_queries, sparse_mla
from model.checkpoint import Weights
from model.config import ModelConfig
from model.indexer import Indexer
from model.inputs import PAGE_SIZE, ForwardInputs
from model.pages import LayerPages

AttentionMode = Literal["sparse", "dense"]

# The norms of the two latents have this epsilon whatever `rms_norm_eps` says, as in transformers.
LATENT_NORM_EPS = 1e-6
# Expanding k and v pays from this many queries on one context; fewer run absorbed.
MIN_EXPANDED_ROWS = 16


def expanded_pays(config: ModelConfig, num_rows: int, kv_len: int) -> bool:
    """Whether the last num_rows of kv_len tokens attend faster expanded, under a mask, than sparse absorbed.

    Compares multiplications, each kind with the time it took on an H100 (2026-11-22, V3.2, in units of sparse
    attention's): expanded attention 0.66, expanding k and v 0.53. For 4,096 rows sparse took 5.9 ms after any
    number of tokens, expanded 1.3 ms after none, 3.6 ms after 4,096 and 5.9 ms after 8,192; for 256 rows 0.41
    against 0.21 ms after 2,048 and 0.36 after 4,096.
    """
    per_key = config.qk_head_dim + config.v_head_dim
    latent = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)  # in or out of latent space
    expanded = 0.66 * num_rows * (kv_len - num_rows / 2) * per_key + 0.53 * kv_len * latent
    chosen = config.index_topk * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    return expanded <= num_rows * (chosen + latent)


class Attention:
    """One layer's attention."""

    def __init__(
        self, config: ModelConfig, weights: Weights, prefix: str, mode: AttentionMode, backend: Backend
    ) -> None:
        self._config, self._mode, self._backend = config, mode, backend
        require(
            mode == "sparse" or backend == "reference",
            "attention",
            f"has no {backend!r} form over everything visible, only over index_topk tokens: use 'sparse'",
        )
        self.indexer = Indexer(config, weights, f"{prefix}.indexer", backend)
        # Projections that read the same input run as one product.
        from_hidden = torch.cat(
            [
                weights.take(f"{prefix}.q_a_proj.weight"),
                weights.take(f"{prefix}.kv_a_proj_with_mqa.weight"),
                weights.take(f"{prefix}.indexer.wk.weight"),
            ]
        )
        from_q_latent = torch.cat(
            [weights.take(f"{prefix}.q_b_proj.weight"), weights.take(f"{prefix}.indexer.wq_b.weight")]
        )
        self._from_hidden = stable(from_hidden, backend=backend)
        self._from_q_latent = stable(from_q_latent, backend=backend)
        self._q_norm = weights.take(f"{prefix}.q_a_layernorm.weight")
        self._kv_norm = weights.take(f"{prefix}.kv_a_layernorm.weight")
        self._o_proj = stable(weights.take(f"{prefix}.o_proj.weight"), backend=backend)
        self._kv_b = weights.take(f"{prefix}.kv_b_proj.weight")
        per_head = self._kv_b.unflatten(0, (config.num_attention_heads, -1))
        w_uk = per_head[:, : config.qk_nope_head_dim].contiguous().transpose(1, 2)  # [H, C, N]
        w_uv = (
            per_head[:, config.qk_nope_head_dim :].transpose(1, 2).contiguous().transpose(1, 2)
        )  # [H, V, C]
        self._w_uk, self._w_uv = stable(w_uk, backend=backend), stable(w_uv, backend=backend)
        if backend == "deterministic":
            require_stable_queries(
                config.num_attention_heads,
                config.latent_dim,
                config.index_topk,
                config.kv_lora_rank,
                w_uk.dtype,
                w_uk.device,
            )

    def forward(
        self,
        x: Tensor,
        inputs: ForwardInputs,
        angles: tuple[Tensor, Tensor],
        pages: LayerPages,
        selected: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend, after writing the rows' own latents and index keys.

        Args:
            x: [T, D], normalised hidden states.
            angles: cos and sin of the rows' positions, [T, R/2] float32.
            selected: where given, receives [T, index_topk] int32 positions that each row attends to.

        Returns:
            [T, D] in x's dtype.
        """
        config = self._config
        q_latent, c, k_pe, index_k = linear(x, self._from_hidden, backend=self._backend).split(
            [config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim], dim=-1
        )
        q_latent = rms_norm(q_latent, self._q_norm, LATENT_NORM_EPS, backend=self._backend)
        c = rms_norm(c, self._kv_norm, LATENT_NORM_EPS, backend=self._backend)
        k_pe = apply_rope(k_pe, *angles, interleaved=True, backend=self._backend)
        pages.write_latents(inputs.slots, c, k_pe)
        self.indexer.write_keys(index_k, inputs, angles, pages)

        num_q = config.num_attention_heads * config.qk_head_dim
        q, index_q = linear(q_latent, self._from_q_latent, backend=self._backend).split(
            [num_q, config.index_n_heads * config.index_head_dim], dim=-1
        )
        q = q.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_pe = apply_rope(q_pe, *angles, interleaved=True, backend=self._backend)

        chosen = self._choose(x, index_q, inputs, angles, pages)
        if selected is not None:
            selected.append(self._as_positions(chosen, inputs))
        if self._backend == "deterministic":
            heads = self._attend_alike(q_nope, q_pe, chosen, inputs, pages)
        else:
            heads = self._attend(q_nope, q_pe, chosen, inputs, pages)
        return linear(heads.flatten(1), self._o_proj, backend=self._backend)

    def _choose(
        self,
        x: Tensor,
        index_q: Tensor,
        inputs: ForwardInputs,
        angles: tuple[Tensor, Tensor],
        pages: LayerPages,
    ) -> list[Tensor | None]:
        """For each sequence the positions its rows attend to, [rows, index_topk] int32, or None for all."""
        needs = [
            self._mode == "sparse" and segment.kv_len > self._config.index_topk for segment in inputs.segments
        ]
        if not any(needs):
            return [None] * len(needs)
        queries = self.indexer.queries(x, index_q, angles, pages)
        return [
            self.indexer.select(queries, sequence, inputs, pages) if needed else None
            for sequence, needed in enumerate(needs)
        ]

    def _attend(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        chosen: list[Tensor | None],
        inputs: ForwardInputs,
        pages: LayerPages,
    ) -> Tensor:
        """[T, H, V]: each sequence in the form that suits it; all sparse rows together."""
        out = q_nope.new_empty(*q_nope.shape[:2], self._config.v_head_dim)
        sparse_rows, sparse_slots = [], []
        for sequence, (segment, selection) in enumerate(zip(inputs.segments, chosen, strict=True)):
            rows = slice(segment.start, segment.stop)
            many = segment.num_rows >= MIN_EXPANDED_ROWS
            pays = selection is None or expanded_pays(self._config, segment.num_rows, segment.kv_len)
            if many and pays:
                latents = pages.read_latents(inputs.slots_of(sequence)).to(q_nope.dtype)
                out[rows] = self._expanded(q_nope[rows], q_pe[rows], latents, inputs.visible[rows], selection)
            elif selection is None:
                latents = pages.read_latents(inputs.slots_of(sequence))
                out[rows] = self._absorbed_dense(q_nope[rows], q_pe[rows], latents, inputs.visible[rows])
            else:
                sparse_rows.append(torch.arange(segment.start, segment.stop, device=out.device))
                sparse_slots.append(slots_of_positions(selection, inputs.page_table[sequence]))
        if sparse_rows:
            rows_T = torch.cat(sparse_rows)
            out[rows_T] = self._absorbed_sparse(q_nope[rows_T], q_pe[rows_T], torch.cat(sparse_slots), pages)
        return out

    def _attend_alike(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        chosen: list[Tensor | None],
        inputs: ForwardInputs,
        pages: LayerPages,
    ) -> Tensor:
        """[T, H, V]: every row in one form, over index_topk slots."""
        config = self._config
        q = self._absorb(q_nope, q_pe)
        positions = self._as_positions(chosen, inputs)
        out = q.new_empty(*q.shape[:2], config.kv_lora_rank)
        together, slots = [], []
        for sequence, segment in enumerate(inputs.segments):
            rows = torch.arange(segment.start, segment.stop, device=q.device)
            if segment.num_rows > 1 and segment.num_rows * config.index_topk > segment.kv_len:
                # Rows that share most of what they read: widen it once. It is the same wherever it lies.
                latents = pages.read_latents(inputs.slots_of(sequence))
                out[rows] = self._over_slots(q[rows], positions[rows].long(), latents.__getitem__)
            else:
                together.append(rows)
                slots.append(slots_of_positions(positions[rows], inputs.page_table[sequence]))
        if together:
            rows = torch.cat(together)
            out[rows] = self._over_slots(q[rows], torch.cat(slots), pages.read_latents)
        return self._leave_latent_space(out)

    def _expanded(
        self, q_nope: Tensor, q_pe: Tensor, latents: Tensor, visible: Tensor, selection: Tensor | None
    ) -> Tensor:
        config = self._config
        c, k_pe = latents.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        expanded = linear(c, self._kv_b, backend=self._backend).unflatten(
            -1, (config.num_attention_heads, -1)
        )
        k_nope, v = expanded.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, config.num_attention_heads, -1)], dim=-1)
        q = torch.cat([q_nope, q_pe], dim=-1)
        return masked_mha(q, k, v, visible, selection, config.softmax_scale, backend=self._backend)

    def _absorbed_dense(self, q_nope: Tensor, q_pe: Tensor, latents: Tensor, visible: Tensor) -> Tensor:
        config = self._config
        q = self._absorb(q_nope, q_pe)
        out = dense_mla(q, latents, visible, config.softmax_scale, config.kv_lora_rank, backend=self._backend)
        return self._leave_latent_space(out)

    def _absorbed_sparse(self, q_nope: Tensor, q_pe: Tensor, slots: Tensor, pages: LayerPages) -> Tensor:
        q = self._absorb(q_nope, q_pe)
        return self._leave_latent_space(self._over_slots(q, slots, pages.read_latents))

    def _over_slots(self, q: Tensor, slots: Tensor, read_latents: Callable[[Tensor], Tensor]) -> Tensor:
        """[T, H, C] of absorbed queries [T, H, C + R]."""
        config = self._config
        return sparse_mla(
            q, read_latents, slots, config.softmax_scale, config.kv_lora_rank, backend=self._backend
        )

    def _absorb(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        """[T, H, C + R]: queries that can be compared with latents."""
        q_c = linear(q_nope.transpose(0, 1), self._w_uk, backend=self._backend).transpose(0, 1)
        return torch.cat([q_c, q_pe], dim=-1)

    def _leave_latent_space(self, out: Tensor) -> Tensor:
        """[T, H, C] to [T, H, V]."""
        return linear(out.transpose(0, 1), self._w_uv, backend=self._backend).transpose(0, 1)

    def _as_positions(self, chosen: list[Tensor | None], inputs: ForwardInputs) -> Tensor:
        """[T, index_topk] int32, -1 padded, with "all visible" spelled out; for looking inside.

        In dense mode only the first index_topk positions of a row fit.
        """
        k = self._config.index_topk
        positions = torch.arange(k, dtype=torch.int32, device=inputs.positions.device)
        everything = positions.masked_fill(positions >= inputs.visible.unsqueeze(1), -1)
        for segment, selection in zip(inputs.segments, chosen, strict=True):
            if selection is not None:
                everything[segment.start : segment.stop] = selection
        return everything


def slots_of_positions(positions: Tensor, page_row: Tensor) -> Tensor:
    """Translate positions of one sequence through its row of the page table.

    Args:
        positions: [T, K] int32, -1 for unused.
        page_row: [max_pages] int64.

    Returns:
        [T, K] int64 slots, -1 for unused.
    """
    known = positions.long().clamp_min(0)
    slots = page_row[known // PAGE_SIZE] * PAGE_SIZE + known % PAGE_SIZE
    return slots.masked_fill_(positions < 0, -1)
