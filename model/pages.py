"""The paged caches of every layer, in one of two formats.

`fp8` is what is served: the 656-byte latent record and the planar index page, byte for byte those of the
public kernels, index keys rotated by Hadamard and quantised. `full` keeps both in full precision, index keys
unrotated: the format for exactness, equal to an unquantised implementation.
One slot numbering serves all layers and both caches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.fp8_quant import quantize
from kernels.hadamard import hadamard
from kernels.index_pages import read_index_keys_fp8, write_index_keys_fp8
from kernels.latent_pages import read_latents_fp8, record_bytes, write_latents_fp8
from model.config import ModelConfig
from model.inputs import PAGE_SIZE

PageFormat = Literal["fp8", "full"]

Zeros = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
"""Makes zeros: shape, dtype, device."""


def torch_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros from torch's own pool."""
    return torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class LayerPages:
    """One layer's pages.

    Attributes:
        latents: fp8: [P, PAGE_SIZE, record_bytes] uint8; full: [P, PAGE_SIZE, latent_dim] of model dtype.
        index_keys: fp8: [P, PAGE_SIZE * (index_head_dim + 4)] uint8; full: [P, PAGE_SIZE, index_head_dim].
    """

    latents: Tensor
    index_keys: Tensor
    page_format: PageFormat
    kv_lora_rank: int
    backend: Backend

    def write_latents(self, slots: Tensor, c: Tensor, k_pe: Tensor) -> None:
        """Store [T, C] normalised latents and [T, R] rotated keys."""
        if self.page_format == "fp8":
            write_latents_fp8(self.latents, slots, c, k_pe, backend=self.backend)
        else:
            self.latents.flatten(0, 1)[slots] = torch.cat([c, k_pe], dim=-1).to(self.latents.dtype)

    def read_latents(self, slots: Tensor) -> Tensor:
        """[N, C + R] latents at [N] slots, float32 or the pages' own dtype."""
        if self.page_format == "fp8":
            return read_latents_fp8(self.latents, slots, self.kv_lora_rank, backend=self.backend)
        return self.latents.flatten(0, 1).index_select(0, slots)

    def encode_index(self, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bring index queries [T, H, D] or keys [T, D] into the form that is scored and cached.

        Returns:
            The vectors, and their scales [T, H] or [T] float32 where the format has them.
        """
        if self.page_format == "full":
            return vectors, None
        values, scales = quantize(
            hadamard(vectors, backend=self.backend), vectors.shape[-1], backend=self.backend
        )
        return values, scales.squeeze(-1)

    def write_index_keys(self, slots: Tensor, keys: Tensor, scales: Tensor | None) -> None:
        """Store what `encode_index` made of [T, D] keys."""
        if scales is not None:
            write_index_keys_fp8(self.index_keys, slots, keys, scales, PAGE_SIZE, backend=self.backend)
        else:
            self.index_keys.flatten(0, 1)[slots] = keys.to(self.index_keys.dtype)

    def read_index_keys(self, page_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keys [N * PAGE_SIZE, D] of whole pages in order, and their scales where the format has them."""
        if self.page_format == "fp8":
            return read_index_keys_fp8(self.index_keys, page_ids, PAGE_SIZE, backend=self.backend)
        return self.index_keys[page_ids].flatten(0, 1), None


class PageCache:
    """The pages of all layers, the MTP layer's last. Which page is whose is the page pool's business."""

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_format: PageFormat,
        dtype: torch.dtype,
        *,
        backend: Backend,
        device: torch.device | str = "cpu",
        zeros: Zeros = torch_zeros,
    ) -> None:
        """`zeros` makes the memory; where another GPU writes pages it is the transport's `shared_zeros`."""
        self.num_pages = num_pages
        index_dim = config.index_head_dim
        record = record_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
        device = torch.device(device)

        def layer() -> LayerPages:
            if page_format == "fp8":
                latents = zeros((num_pages, PAGE_SIZE, record), torch.uint8, device)
                keys = zeros((num_pages, PAGE_SIZE * (index_dim + 4)), torch.uint8, device)
            else:
                latents = zeros((num_pages, PAGE_SIZE, config.latent_dim), dtype, device)
                keys = zeros((num_pages, PAGE_SIZE, index_dim), dtype, device)
            return LayerPages(latents, keys, page_format, config.kv_lora_rank, backend)

        self.layers = [layer() for _ in range(config.num_cached_layers)]

    @property
    def pools(self) -> list[Tensor]:
        """[P, ...] each: latents and index keys of the first layer, then of the next."""
        return [pool for layer in self.layers for pool in (layer.latents, layer.index_keys)]


def cache_bytes_per_token(config: ModelConfig, page_format: PageFormat, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the pages of all layers; 48,856 for V3.2 with its MTP layer in fp8."""
    if page_format == "fp8":
        a_layer = record_bytes(config.kv_lora_rank, config.qk_rope_head_dim) + config.index_head_dim + 4
    else:
        a_layer = (config.latent_dim + config.index_head_dim) * dtype.itemsize
    return config.num_cached_layers * a_layer
