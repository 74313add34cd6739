"""A whole model in this process: from a checkpoint directory to something that can be stepped."""

from dataclasses import dataclass
from pathlib import Path

from kernels.backend import Backend
from model.attention import AttentionMode
from model.checkpoint import Checkpoint, all_but_routed_experts, everything
from model.decoder import DTYPES, Decoder, DTypeName
from model.moe import Experts, LocalExperts
from model.pages import PageCache, PageFormat
from workers.engine import Engine, EngineConfig
from workers.page_pool import pages_for


@dataclass(frozen=True)
class ModelOptions:
    """How a model is computed: the arithmetic's dtype, the page format, sparse or dense, which kernels."""

    dtype: DTypeName = "float32"
    pages: PageFormat = "full"
    attention: AttentionMode = "sparse"
    kernels: Backend = "reference"


class LocalModel:
    """A checkpoint's model in this process, its routed experts too unless somebody else computes them."""

    def __init__(
        self,
        directory: Path,
        options: ModelOptions,
        *,
        experts: Experts | None = None,
        progress: bool = False,
    ) -> None:
        """Open, check and load.

        Args:
            experts: who computes the routed experts; then none of theirs are read here.

        Raises:
            CheckpointError: before anything could run on a bad checkpoint.
        """
        self.options = options
        self.checkpoint = Checkpoint.open(directory)
        self.config = self.checkpoint.config
        weights = self.checkpoint.load(
            all_but_routed_experts if experts else everything,
            dtype=DTYPES[options.dtype],
            progress=progress,
        )
        experts = experts or LocalExperts(self.config, weights, range(self.config.n_group), options.kernels)
        self.decoder = Decoder(self.config, weights, experts, mode=options.attention, backend=options.kernels)
        assert not weights, f"loaded and not used: {sorted(weights)[:3]}"

    def cache(self, num_tokens: int) -> PageCache:
        """Pages for so many tokens."""
        return PageCache(
            self.config,
            pages_for(num_tokens),
            self.options.pages,
            DTYPES[self.options.dtype],
            backend=self.options.kernels,
        )

    def engine(self, config: EngineConfig, num_tokens: int) -> Engine:
        """An engine whose sequences hold at most so many tokens together."""
        return Engine(self.decoder, self.cache(num_tokens), config)
