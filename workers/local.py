"""A whole model in this process: from a checkpoint directory to something that can be stepped."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from kernels.backend import Backend, require
from model.attention import AttentionMode
from model.checkpoint import Checkpoint, Weights, all_but_routed_experts, everything
from model.config import ModelConfig
from model.decoder import DTYPES, Decoder, DTypeName
from model.graphs import DecodeGraphs
from model.moe import Experts, LocalExperts, NoSteps, steps_of
from model.pages import PageCache, PageFormat
from model.random_weights import RandomCheckpoint
from workers.engine import Engine, EngineConfig
from workers.page_pool import pages_for

WeightSource = Literal["checkpoint", "random"]


@dataclass(frozen=True)
class ModelOptions:
    """How a model is computed: arithmetic's dtype, page format, sparse or dense, which kernels, and where.

    `weights: random` needs nothing but a `config.json`, of which it may run the first `layers` only.
    """

    dtype: DTypeName = "float32"
    pages: PageFormat = "full"
    attention: AttentionMode = "sparse"
    kernels: Backend = "reference"
    device: Literal["cpu", "cuda"] = "cpu"
    third_party: tuple[Literal["deep_gemm", "flash_mla"], ...] = ()
    weights: WeightSource = "checkpoint"
    layers: int | None = None

    def __post_init__(self) -> None:
        require(self.layers is None or self.weights == "random", "layers", "goes with weights random only")
        if self.kernels == "triton":
            for field, needed in (("device", "cuda"), ("dtype", "bfloat16"), ("pages", "fp8")):
                found = getattr(self, field)
                require(found == needed, "kernels", f"'triton' goes with {field} {needed}, not {found}")
        require(
            not self.third_party or self.kernels == "triton", "third_party", "goes with kernels triton only"
        )


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
        self.checkpoint = open_checkpoint(directory, options)
        self.config = self.checkpoint.config
        weights = self.checkpoint.load(
            all_but_routed_experts if experts else everything,
            dtype=DTYPES[options.dtype],
            device=options.device,
            widen=options.kernels != "triton",
            progress=progress,
        )
        self.decoder = build_decoder(self.config, weights, experts, options)
        self.steps = steps_of(experts)
        # Some experts elsewhere are asked by the host, and what a library asks it is not known.
        is_asked = experts is not None and isinstance(self.steps, NoSteps)
        self._can_record = options.kernels == "triton" and not is_asked and not options.third_party
        self._splits = experts is not None
        assert not weights, f"loaded and not used: {sorted(weights)[:3]}"

    def cache(self, num_tokens: int) -> PageCache:
        """Pages for so many tokens."""
        return PageCache(
            self.config,
            pages_for(num_tokens),
            self.options.pages,
            DTYPES[self.options.dtype],
            backend=self.options.kernels,
            device=self.options.device,
        )

    def engine(self, config: EngineConfig, num_tokens: int) -> Engine:
        """An engine whose sequences hold at most so many tokens together."""
        cache = self.cache(num_tokens)
        graphs = self.graphs(cache, config.micro_batches)
        return Engine(self.decoder, cache, config, graphs=graphs, experts=self.steps)

    def graphs(self, cache: PageCache, micro_batches: int = 1) -> DecodeGraphs | None:
        """Of decode steps over a cache; None where a step needs the host on its way.

        Args:
            micro_batches: of each, where experts are elsewhere.
        """
        if not self._can_record:
            return None
        return DecodeGraphs(
            self.decoder, cache, experts=self.steps, micro_batches=micro_batches if self._splits else 1
        )


def open_checkpoint(directory: Path, options: ModelOptions) -> Checkpoint | RandomCheckpoint:
    """Whatever the options say that the weights come from.

    Raises:
        CheckpointError: it is not as it must be.
    """
    if options.weights == "random":
        return RandomCheckpoint.open(directory, options.layers)
    return Checkpoint.open(directory)


def build_decoder(
    config: ModelConfig, weights: Weights, experts: Experts | None, options: ModelOptions
) -> Decoder:
    """A decoder of loaded weights, in the form that its kernels ask for.

    Args:
        experts: who computes the routed experts, or None: this process.

    Raises:
        UnsupportedKernel: the kernels cannot serve such weights.
    """
    mode, backend, groups = options.attention, options.kernels, range(config.n_group)
    if backend != "triton":
        experts = experts or LocalExperts(config, weights, groups, backend)
        return Decoder(config, weights, experts, mode=mode, backend=backend)
    require(config.quantization_config is not None, "kernels", "'triton' serves FP8 checkpoints only")
    # Imported where they run: Triton takes 60 MiB, which workers without a GPU spare.
    from model.fused.feed_forward import FusedExperts
    from model.fused.layer import FusedLayer

    experts = experts or FusedExperts(config, weights, groups, backend)
    layer_class = partial(FusedLayer, third_party=options.third_party)
    return Decoder(config, weights, experts, mode=mode, backend=backend, layer_class=layer_class)
