"""Multi-head latent attention with the lightning indexer for GPUs, over FP8 pages.

Rows of sequences that contribute a few each (decode, with the drafts they verify) go through paged kernels
all together; a sequence with more of them (a chunk of a prompt) goes by itself. A decode layer takes, norm to
residual, at most fourteen launches:

    norm + quantise | project | head weights | q norm, latent and index key into pages | project |
    index queries, RoPE, absorb | index logits | select (2 for few rows) | attend | combine (for few rows) |
    leave latent space + quantise | project | residual + norm + quantise (the next part's first)

Shapes: T rows, H heads, N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, C kv_lora_rank.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kernels.attention_inputs import AttentionNorms, ProjectedColumns, attention_inputs
from kernels.backend import Backend, require
from kernels.bf16_gemm import bf16_gemm, per_head_gemm
from kernels.dense_mla_decode import dense_mla_decode
from kernels.expanded_mha import expanded_mha
from kernels.gather_latents import gather_latents
from kernels.index_pages import read_index_keys_fp8
from kernels.latent_outputs import latent_outputs
from kernels.quantize_rows import quantize_rows
from kernels.query_inputs import query_inputs
from kernels.select_slots import select_slots
from model.attention import LATENT_NORM_EPS, AttentionMode, expanded_pays
from model.checkpoint import Weights
from model.config import ModelConfig
from model.fused.feed_forward import Quantized
from model.fused.operations import Operations
from model.fused.weights import Fp8Matrix, padded
from model.inputs import MAX_DECODE_ROWS, PAGE_SIZE, DecodeRows, ForwardInputs
from model.pages import LayerPages

_TILE_SCORES = 1 << 28  # [rows, keys] fp32 scores of a prompt alive at once: 1 GiB


class FusedAttention:
    """One layer's attention, for FP8 checkpoints and FP8 pages."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        prefix: str,
        mode: AttentionMode,
        backend: Backend,
        ops: Operations,
    ) -> None:
        self._config, self._mode, self._backend, self._ops = config, mode, backend, ops
        self._from_hidden = Fp8Matrix.take(
            weights,
            f"{prefix}.q_a_proj.weight",
            f"{prefix}.indexer.wk.weight",
            f"{prefix}.kv_a_proj_with_mqa.weight",
        )
        self._columns = ProjectedColumns(
            config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim
        )
        self._from_q_latent = Fp8Matrix.take(
            weights, f"{prefix}.q_b_proj.weight", f"{prefix}.indexer.wq_b.weight"
        )
        self._num_q = config.num_attention_heads * config.qk_head_dim
        self._index_start = padded(self._num_q)
        self._o_proj = Fp8Matrix.take(weights, f"{prefix}.o_proj.weight")
        kv_b = Fp8Matrix.take(weights, f"{prefix}.kv_b_proj.weight")
        self._kv_b = kv_b
        per_head = kv_b.widen().to(torch.bfloat16).unflatten(0, (config.num_attention_heads, -1))
        w_uk, w_uv = per_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        self._w_uk = w_uk.transpose(1, 2).contiguous()  # [H, C, N]
        self._w_uv = w_uv.contiguous()  # [H, V, C]
        self._norms = AttentionNorms(
            q=weights.take(f"{prefix}.q_a_layernorm.weight"),
            kv=weights.take(f"{prefix}.kv_a_layernorm.weight"),
            key_weight=weights.take(f"{prefix}.indexer.k_norm.weight"),
            key_bias=weights.take(f"{prefix}.indexer.k_norm.bias"),
        )
        self._weights_proj = weights.take(f"{prefix}.indexer.weights_proj.weight").to(torch.bfloat16)

    def forward(
        self,
        x: Quantized,
        normed: Tensor,
        inputs: ForwardInputs,
        angles: tuple[Tensor, Tensor],
        pages: LayerPages,
        selected: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend, after writing the rows' own latents and index keys.

        Args:
            x, normed: [T, D], the same rows, quantised and as they are.
            angles: cos and sin of the rows' positions, [T, R/2] float32.
            selected: where given, receives [T, index_topk] int32 positions that each row attends to.

        Returns:
            [T, D] bf16.
        """
        require(pages.page_format == "fp8", "attention", "'triton' reads and writes pages of format fp8")
        config, backend = self._config, self._backend
        projected = self._ops.fp8_gemm(*x, self._from_hidden.values, self._from_hidden.scales)
        head_weights = bf16_gemm(normed, self._weights_proj, backend=backend)
        q_latent = attention_inputs(
            projected,
            self._columns,
            self._norms,
            *angles,
            inputs.slots,
            pages.latents,
            pages.index_keys,
            LATENT_NORM_EPS,
            backend=backend,
        )
        projected = self._ops.fp8_gemm(*q_latent, self._from_q_latent.values, self._from_q_latent.scales)
        q = projected[:, : self._num_q].unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        index_q = projected[:, self._index_start :][:, : config.index_n_heads * config.index_head_dim]
        absorbed = q.new_empty(len(normed), config.num_attention_heads, config.latent_dim)
        # A prompt on a short context runs expanded, so its rows are absorbed later or never.
        decodes = all(segment.num_rows <= MAX_DECODE_ROWS for segment in inputs.segments)
        index_q, index_weights = query_inputs(
            index_q.unflatten(-1, (config.index_n_heads, config.index_head_dim)),
            head_weights,
            q,
            absorbed,
            *angles,
            self._w_uk if decodes else None,
            backend=backend,
        )
        queries = _Queries(q, absorbed, decodes, index_q, index_weights)
        values = self._attend(queries, inputs, pages, selected)
        return self._ops.fp8_gemm(*values, self._o_proj.values, self._o_proj.scales)

    def _attend(
        self, queries: "_Queries", inputs: ForwardInputs, pages: LayerPages, selected: list[Tensor] | None
    ) -> Quantized:
        """[T, H * V], quantised: decode rows together, every longer run of rows by itself."""
        config, backend = self._config, self._backend
        prompts = [i for i, segment in enumerate(inputs.segments) if segment.num_rows > MAX_DECODE_ROWS]
        decoding = inputs.decode_rows
        positions = queries.absorbed.new_empty(0)
        if selected is not None:
            positions = torch.full(
                (inputs.num_rows, config.index_topk), -1, dtype=torch.int32, device=inputs.slots.device
            )
            selected.append(positions)
        if decoding is not None and not prompts:
            attended = self._decode(queries.of(decoding.rows), decoding, pages, positions)
            return latent_outputs(attended, self._w_uv, backend=backend)
        shape = inputs.num_rows, config.num_attention_heads, config.v_head_dim
        heads = torch.empty(shape, dtype=queries.q.dtype, device=queries.q.device)
        if decoding is not None:
            attended = self._decode(queries.of(decoding.rows), decoding, pages, positions)
            heads[decoding.rows] = per_head_gemm(attended, self._w_uv, backend=backend)
        for sequence in prompts:
            segment = inputs.segments[sequence]
            rows = slice(segment.start, segment.stop)
            self._prefill(queries.of(rows), inputs, sequence, pages, positions, out=heads[rows])
        return quantize_rows(heads.flatten(1), backend=backend)

    def _absorb(self, queries: "_Queries") -> Tensor:
        """[T, H, C + R]: with q_nope brought to latent space, in front of the rotated q_pe."""
        if queries.is_absorbed:
            return queries.absorbed
        q_nope = queries.q[..., : self._config.qk_nope_head_dim]
        q_c = queries.absorbed[..., : self._config.kv_lora_rank]
        per_head_gemm(q_nope, self._w_uk, out=q_c, backend=self._backend)
        return queries.absorbed

    def _decode(self, queries: "_Queries", group: DecodeRows, pages: LayerPages, positions: Tensor) -> Tensor:
        """[T, H, C] of the rows of a group."""
        config, backend = self._config, self._backend
        rows, longest = group.rows_per_sequence, group.max_visible
        absorbed = self._absorb(queries)
        if self._mode == "dense" or group.max_visible <= config.index_topk:
            if positions.numel():
                positions[group.rows] = _everything(group.visible, config.index_topk)
            return dense_mla_decode(
                absorbed,
                pages.latents,
                group.page_table,
                group.visible,
                rows_per_sequence=rows,
                max_visible=longest,
                scale=config.softmax_scale,
                kv_lora_rank=config.kv_lora_rank,
                backend=backend,
            )
        logits = self._ops.paged_index_logits(
            queries.index_q,
            pages.index_keys,
            queries.index_weights,
            group.page_table,
            group.visible,
            rows_per_sequence=rows,
            max_visible=longest,
        )
        select = partial(
            select_slots,
            logits,
            group.visible,
            rows_per_sequence=rows,
            k=config.index_topk,
            max_visible=longest,
            backend=backend,
        )
        slots = select(page_table=group.page_table)
        if positions.numel():  # for looking inside: the same choice, not translated
            positions[group.rows] = select(page_table=None)
        return self._ops.sparse_mla_decode(
            absorbed,
            pages.latents,
            slots,
            scale=config.softmax_scale,
            kv_lora_rank=config.kv_lora_rank,
        )

    def _prefill(
        self,
        queries: "_Queries",
        inputs: ForwardInputs,
        sequence: int,
        pages: LayerPages,
        positions: Tensor,
        out: Tensor,
    ) -> None:
        """Fill out [T, H, V] for one sequence's rows: expanded while the context is short, then absorbed."""
        config, backend = self._config, self._backend
        segment = inputs.segments[sequence]
        rows = slice(segment.start, segment.stop)
        visible = inputs.visible[rows]
        latents = gather_latents(
            pages.latents,
            inputs.pages_of(sequence),
            segment.kv_len,
            kv_lora_rank=config.kv_lora_rank,
            backend=backend,
        )
        # The first rows may see no more than they could choose: they have no choice to make.
        free = segment.num_rows
        if self._mode == "sparse":
            free = min(max(free + config.index_topk - segment.kv_len, 0), free)
        chosen = None
        if free < segment.num_rows:
            choosing = slice(free, None)
            chosen = self._select(queries.of(choosing), visible[choosing], inputs, sequence, pages)
        if positions.numel():
            positions[rows] = _with_everything(visible[:free], chosen, config.index_topk)
        if chosen is None or expanded_pays(config, segment.num_rows, segment.kv_len):
            self._expanded(queries.q, queries.absorbed, latents, visible, chosen, out)
            return
        attended = self._ops.sparse_mla_prefill(
            self._absorb(queries),
            latents,
            _with_everything(visible[:free], chosen, config.index_topk),
            scale=config.softmax_scale,
            kv_lora_rank=config.kv_lora_rank,
        )
        per_head_gemm(attended, self._w_uv, out=out, backend=backend)

    def _select(
        self,
        queries: "_Queries",
        visible: Tensor,
        inputs: ForwardInputs,
        sequence: int,
        pages: LayerPages,
    ) -> Tensor:
        """[T, index_topk] int32 positions, -1 padded."""
        num_keys = inputs.segments[sequence].kv_len
        keys, scales = read_index_keys_fp8(
            pages.index_keys, inputs.pages_of(sequence), PAGE_SIZE, backend="reference"
        )
        tile = max(1, _TILE_SCORES // num_keys)
        chosen = []
        for start in range(0, len(visible), tile):
            rows = slice(start, start + tile)
            logits = self._ops.ragged_index_logits(
                queries.index_q[rows],
                keys[:num_keys],
                scales[:num_keys],
                queries.index_weights[rows],
                visible[rows],
            )
            chosen.append(
                select_slots(
                    logits,
                    visible[rows],
                    None,
                    rows_per_sequence=1,
                    k=self._config.index_topk,
                    max_visible=num_keys,
                    backend=self._backend,
                )
            )
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)

    def _expanded(
        self,
        q: Tensor,
        absorbed: Tensor,
        latents: Tensor,
        visible: Tensor,
        chosen: Tensor | None,
        out: Tensor,
    ) -> None:
        """Fill out [T, H, V], over keys and values expanded from all latents [L, C + R]."""
        config, backend = self._config, self._backend
        c, k_pe = latents.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        expanded = self._ops.fp8_gemm(
            *quantize_rows(c, backend=backend),
            self._kv_b.values,
            self._kv_b.scales,
        ).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, v = expanded.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        q_nope, q_pe = q[..., : config.qk_nope_head_dim], absorbed[..., config.kv_lora_rank :]
        scale = config.softmax_scale
        expanded_mha(q_nope, q_pe, k_nope, k_pe, v, visible, chosen, scale, out=out, backend=backend)


@dataclass(frozen=True)
class _Queries:
    """What T rows ask with: `q` [T, H, N + R] before RoPE; `absorbed` [T, H, C + R] with RoPE in its last R
    channels, the rest there already or room for it; index queries [T, H_i, D] e4m3 and their head weights
    [T, H_i] float32."""

    q: Tensor
    absorbed: Tensor
    is_absorbed: bool
    index_q: Tensor
    index_weights: Tensor

    def of(self, rows: slice | Tensor) -> "_Queries":
        return replace(
            self,
            q=self.q[rows],
            absorbed=self.absorbed[rows],
            index_q=self.index_q[rows],
            index_weights=self.index_weights[rows],
        )


def _everything(visible: Tensor, num: int) -> Tensor:
    """[T, num] int32: all that a row sees, -1 padded."""
    places = torch.arange(num, dtype=torch.int32, device=visible.device)
    return places.masked_fill(places >= visible.unsqueeze(1), -1)


def _with_everything(visible: Tensor, chosen: Tensor | None, num: int) -> Tensor:
    """[T, num] int32: all that the first rows see, then what the others have chosen."""
    if chosen is None:
        return _everything(visible, num)
    return torch.cat([_everything(visible, num), chosen]) if len(visible) else chosen
