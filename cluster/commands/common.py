"""What several commands share: options to objects, and prompts from files."""

import json
from argparse import Namespace
from pathlib import Path

from model.errors import CheckpointError, RequestError
from model.sampling_params import SamplingParams
from workers.engine import EngineConfig
from workers.local import LocalModel, ModelOptions


def checkpoint_directory(path: Path) -> Path:
    """The path itself, once it is clear that there is something to read."""
    if not path.is_dir():
        raise CheckpointError(str(path), "", "a checkpoint directory", "no such directory")
    return path


def load_model(options: Namespace) -> LocalModel:
    """The model that the options name, with a progress bar on a terminal."""
    model_options = ModelOptions(dtype=options.dtype, pages=options.pages, attention=options.attention)
    return LocalModel(checkpoint_directory(options.model), model_options, progress=True)


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
