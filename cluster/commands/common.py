"""What several commands share: options to objects, and prompts from files."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from kernels.backend import UnsupportedKernel, require
from model.errors import CheckpointError, RequestError
from model.sampling_params import SamplingParams
from workers.engine import EngineConfig
from workers.local import LocalModel, ModelOptions, WeightSource


def checkpoint_directory(path: Path) -> Path:
    """The path itself, once it is clear that there is something to read."""
    if not path.is_dir():
        raise CheckpointError(str(path), "", "a checkpoint directory", "no such directory")
    return path


def load_model(options: Namespace) -> LocalModel:
    """The model that the options name, with a progress bar on a terminal.

    Raises:
        RequestError: the kernels asked for cannot be had here, or not with these options.
    """
    try:
        return LocalModel(checkpoint_directory(options.model), model_options(options), progress=True)
    except UnsupportedKernel as error:
        raise RequestError("--kernels", str(error)) from None


def model_options(options: Namespace) -> ModelOptions:
    """How the model is computed: what the options say, and else what goes with the kernels they name.

    Raises:
        RequestError, UnsupportedKernel: they do not go together.
    """
    weights: WeightSource = getattr(options, "weights", "checkpoint")
    layers: int | None = getattr(options, "layers", None)
    if layers is not None and weights != "random":
        raise RequestError("--layers", "goes with --weights random only: a checkpoint is served whole")
    make = partial(ModelOptions, attention=options.attention, weights=weights, layers=layers)
    if getattr(options, "kernels", "reference") == "reference":
        return make(options.dtype or "float32", options.pages or "full")
    require(torch.cuda.is_available(), "triton", "no GPU can be used here (torch finds none)")
    return make(options.dtype or "bfloat16", options.pages or "fp8", kernels="triton", device="cuda")


def sampling_params(options: Namespace, max_tokens: int) -> SamplingParams:
    """Sampling as the options say."""
    return SamplingParams(
        max_tokens=max_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )


def engine_config(options: Namespace) -> EngineConfig:
    return EngineConfig(chunk=options.chunk, num_drafts=options.drafts)


def read_prompt_ids(path: Path) -> list[int]:
    """Token ids from a JSON file.

    Raises:
        RequestError: the file cannot be read or is not a list of integers.
    """
    try:
        ids = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError("--prompt-ids", f"{path.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError("--prompt-ids", f"{path.name} is not JSON: {error}") from None
    if not isinstance(ids, list) or not all(type(token_id) is int for token_id in ids):
        raise RequestError("--prompt-ids", f"{path.name} must hold a JSON list of integers, such as [0, 42]")
    return ids
