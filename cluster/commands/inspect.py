"""`eightfold inspect`: check a checkpoint and say what the model is."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from cluster.commands.common import checkpoint_directory
from model.checkpoint import INDEX_FILE, Checkpoint
from model.config import ModelConfig
from model.layout import TensorSpec, layout
from model.pages import cache_bytes_per_token
from model.text import load_text


def run(options: Namespace) -> int:
    """Check everything there is to check, then print the model's shape, counts and bytes."""
    directory = checkpoint_directory(options.directory)
    report = describe(ModelConfig.load(directory))
    if _is_shape_only(directory):
        report["checked"] = "configuration only: there are no weights here"
    else:
        report.update(check(directory))
    print(json.dumps(report, indent=1) if options.json else as_text(report))
    return 0


def _is_shape_only(directory: Path) -> bool:
    """Whether nothing in the directory could be weights."""
    return not any(
        path.name == INDEX_FILE or path.suffix in (".safetensors", ".bin", ".pt")
        for path in directory.iterdir()
    )


def check(directory: Path) -> dict[str, Any]:
    """Check every tensor's name, shape, dtype and values, and the text side; raises `CheckpointError`."""
    checkpoint = Checkpoint.open(directory)
    checkpoint.verify(progress=True)
    tokenizer, encoding = load_text(directory, checkpoint.config)
    num_files = len({tensor.file for tensor in checkpoint.tensors.values()})
    return {
        "checked": f"{len(checkpoint.tensors)} tensors in {num_files} files",
        "weights_digest": checkpoint.digest,
        "tokenizer_vocab_size": tokenizer.vocab_size,
        "chat_encoding": encoding.value,
    }


def describe(config: ModelConfig) -> dict[str, Any]:
    """What the configuration alone tells."""
    specs = list(layout(config))
    main = [spec for spec in specs if spec.layer < config.num_hidden_layers]
    mtp = [spec for spec in specs if spec.layer >= config.num_hidden_layers]
    own_mtp = [spec for spec in mtp if spec.part not in ("embedding", "head")]
    embedding = sum(spec.numel for spec in main if spec.part == "embedding")
    activated = activated_parameters(config, main)
    return {
        "model": "/".join([config.model_type, f"{config.num_hidden_layers} layers"]),
        "layers": config.num_hidden_layers,
        "mtp_layers": config.num_nextn_predict_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        "attention_heads": config.num_attention_heads,
        "index_topk": config.index_topk,
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "groups": config.n_group,
        "groups_per_token": config.topk_group,
        "parameters": sum(spec.numel for spec in main),
        "parameters_mtp": sum(spec.numel for spec in own_mtp),
        "parameters_stored": sum(spec.numel for spec in specs),
        "parameters_activated": activated,
        "parameters_activated_without_embedding": activated - embedding,
        "bytes": sum(spec.num_bytes(config) for spec in specs),
        "bytes_by_role": bytes_by_role(config, specs),
        "bytes_by_part": bytes_by_part(config, specs),
        "cache_bytes_per_token": {
            "fp8": cache_bytes_per_token(config, "fp8", torch.float32),
            "full, bfloat16": cache_bytes_per_token(config, "full", torch.bfloat16),
            "full, float32": cache_bytes_per_token(config, "full", torch.float32),
        },
    }


def activated_parameters(config: ModelConfig, main: list[TensorSpec]) -> int:
    """Parameters that one token uses: of the routed experts, experts_per_token in each layer."""
    routed = sum(spec.numel for spec in main if spec.expert >= 0)
    rest = sum(spec.numel for spec in main if spec.expert < 0)
    return rest + routed * config.num_experts_per_tok // config.n_routed_experts


def bytes_by_role(config: ModelConfig, specs: list[TensorSpec]) -> dict[str, int]:
    """Checkpoint bytes that each role loads; the expert pool is split over n_group nodes."""
    attention = sum(spec.num_bytes(config) for spec in specs if spec.expert < 0)
    experts = sum(spec.num_bytes(config) for spec in specs if spec.expert >= 0)
    return {
        "attention actor": attention,
        "expert pool": experts,
        f"expert node (1 of {config.n_group})": experts // config.n_group,
    }


def bytes_by_part(config: ModelConfig, specs: list[TensorSpec]) -> dict[str, int]:
    """Checkpoint bytes by what they are for."""
    parts: dict[str, int] = {}
    for spec in specs:
        parts[spec.part] = parts.get(spec.part, 0) + spec.num_bytes(config)
    return parts


def as_text(report: dict[str, Any]) -> str:
    """The report for a person: numbers with separators, sizes with units."""
    lines = []
    for key, value in report.items():
        title = key.replace("_", " ")
        if isinstance(value, dict):
            lines.append(title)
            lines.extend(
                f"  {name:<38}{_number(number, 'bytes' in key):>22}" for name, number in value.items()
            )
        else:
            lines.append(f"{title:<40}{_number(value, key == 'bytes'):>22}")
    return "\n".join(lines)


def _number(value: Any, is_bytes: bool) -> str:
    if not isinstance(value, int):
        return str(value)
    text = f"{value:,}"
    return f"{text} B" if is_bytes else text
