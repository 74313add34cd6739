"""Tensors that contradict the configuration, hold bad values or miss their digests, each refused by name."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.errors import CheckpointError
from tests.model.bad_checkpoints import (
    EMBEDDING,
    EXPERT,
    FIRST,
    HEAD,
    INDEX,
    ITS_SHARD,
    MATRIX,
    MTP,
    NORM,
    SCALES,
    SECOND,
    SUMS,
    Bad,
    assert_refused,
    configure,
    edit_tensors,
    put,
    replace,
    write,
)
from tests.model.bad_checkpoints import directory as directory
from tests.model.bad_checkpoints import good as good

pytestmark = pytest.mark.usefixtures("one_thread")


# --- spoiling tensors and digests -----------------------------------------------------------------


def drop(*parts: str) -> Callable[[Path], None]:
    """Every tensor whose name contains one of the parts is missing."""

    def spoil(directory: Path) -> None:
        def edit(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if any(part in name for part in parts)]:
                del tensors[name]

        edit_tensors(directory, edit)

    return spoil


def double(part: str, copied: str) -> Callable[[Path], None]:
    """Every tensor whose name contains `part` stands there twice, as `copied` too."""

    def spoil(directory: Path) -> None:
        def edit(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if part in name]:
                tensors[name.replace(part, copied)] = tensors[name].clone()

        edit_tensors(directory, edit)

    return spoil


def wrong_sum(file: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        sums = {
            name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
            for name in (FIRST, SECOND, file)
        }
        sums[file] = "0" * 64
        (directory / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))

    return spoil


# --- the bad ones ---------------------------------------------------------------------------------

BAD: dict[str, Bad] = {
    # The tensors against the configuration
    "bf16 where fp8 is due": Bad(
        replace(MATRIX, lambda tensor: tensor.bfloat16()), ITS_SHARD, MATRIX, "dtype F8_E4M3", "BF16"
    ),
    "other fp8": Bad(
        replace(MATRIX, lambda tensor: tensor.float().to(torch.float8_e5m2)),
        ITS_SHARD,
        MATRIX,
        "F8_E4M3",
        "F8_E5M2",
    ),
    "fp8 where bf16 is due": Bad(
        replace(HEAD, lambda tensor: tensor.to(torch.float8_e4m3fn)), ITS_SHARD, HEAD, "dtype BF16", "F8_E4M3"
    ),
    "scales not fp32": Bad(
        replace(SCALES, lambda tensor: tensor.bfloat16()), ITS_SHARD, SCALES, "dtype F32", "BF16"
    ),
    "missing scales": Bad(drop(SCALES), INDEX, SCALES, "F32 [1, 2]", "no such tensor"),
    "missing norm": Bad(drop(NORM), INDEX, NORM, "BF16 or F32 [160]", "no such tensor"),
    "wrong shape": Bad(replace(MATRIX, Tensor.t), ITS_SHARD, MATRIX, "shape [48, 160]", "[160, 48]"),
    "wrong scale shape": Bad(
        replace(SCALES, lambda tensor: tensor[:, :1]), ITS_SHARD, SCALES, "shape [1, 2]", "[1, 1]"
    ),
    "vocabulary not the embedding's rows": Bad(
        configure(vocab_size=41), ITS_SHARD, EMBEDDING, "shape [41, 160]", "[40, 160]"
    ),
    "missing expert": Bad(
        drop(".1.mlp.experts.3."),
        INDEX,
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "F8_E4M3 [48, 160]",
        "no such tensor",
    ),
    "extra expert": Bad(
        double("layers.1.mlp.experts.3.", "layers.1.mlp.experts.4."),
        ITS_SHARD,
        "model.layers.1.mlp.experts.4.down_proj.weight",
        "no tensor beyond those of config.json",
        "one more",
    ),
    "missing layer": Bad(
        drop("layers.1."), INDEX, "model.layers.1.input_layernorm.weight", "[160]", "no such tensor"
    ),
    "extra layer": Bad(
        double("model.layers.0.", "model.layers.3."),
        ITS_SHARD,
        "model.layers.3.input_layernorm.weight",
        "no tensor beyond those of config.json",
        "one more",
    ),
    "missing MTP layer": Bad(
        drop(f"{MTP}."), INDEX, f"{MTP}.embed_tokens.weight", "BF16 or F16 or F32 [40, 160]", "no such tensor"
    ),
    "MTP layer that the configuration denies": Bad(
        configure(num_nextn_predict_layers=0),
        ITS_SHARD,
        f"{MTP}.eh_proj.weight",
        "no tensor beyond those of config.json",
        "one more",
    ),
    "fp8 that the configuration denies": Bad(
        configure(quantization_config=None),
        ITS_SHARD,
        "model.layers.0.self_attn.q_a_proj.weight",
        "dtype BF16 or F16 or F32",
        "F8_E4M3",
    ),
    # The configuration; all of its rules are in test_config.py
    "no configuration": Bad(
        lambda directory: (directory / "config.json").unlink(),
        "config.json",
        "",
        "a file of the checkpoint",
        "no such file",
    ),
    "configuration not JSON": Bad(write("config.json", b"model:"), "config.json", "", "JSON", "b'model:'"),
    "more experts a token than there are": Bad(
        configure(num_experts_per_tok=5), "config.json", "num_experts_per_tok", "at most the 2 experts", "5"
    ),
    "indexer that selects nothing": Bad(
        configure(index_topk=0), "config.json", "index_topk", "greater than 0", "0"
    ),
    "groups that do not divide the experts": Bad(
        configure(n_group=3), "config.json", "n_routed_experts", "a multiple of n_group, 3", "4"
    ),
    "unknown RoPE": Bad(
        configure(rope_scaling={"type": "longrope"}),
        "config.json",
        "rope_scaling.type",
        "'default' or 'yarn'",
        '"longrope"',
    ),
    "more experts than the tensors": Bad(
        configure(n_routed_experts=8),
        ITS_SHARD,
        "model.layers.1.mlp.gate.weight",
        "shape [8, 160]",
        "[4, 160]",
    ),
    # Values
    "NaN in an fp8 weight": Bad(put(MATRIX, np.nan), ITS_SHARD, MATRIX, "finite values", "1 NaN", "load"),
    "negative NaN in an fp8 weight": Bad(
        put(EXPERT, -np.nan, at=0), ITS_SHARD, EXPERT, "finite values", "1 NaN or infinite", "load"
    ),
    "NaN in the embedding": Bad(put(EMBEDDING, np.nan), ITS_SHARD, EMBEDDING, "finite", "1 NaN", "load"),
    "NaN in a norm": Bad(put(NORM, np.nan, np.nan), ITS_SHARD, NORM, "finite values", "2 NaN", "load"),
    "infinity in the head": Bad(
        put(HEAD, np.inf), ITS_SHARD, HEAD, "finite values", "1 NaN or infinite", "load"
    ),
    "both infinities": Bad(put(HEAD, np.inf, -np.inf), ITS_SHARD, HEAD, "finite values", "2 NaN or", "load"),
    "NaN in the router's bias": Bad(
        put("model.layers.1.mlp.gate.e_score_correction_bias", np.nan),
        ITS_SHARD,
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "finite values",
        "1 NaN",
        "load",
    ),
    "NaN in scales": Bad(put(SCALES, np.nan), ITS_SHARD, SCALES, "finite values", "1 NaN", "load"),
    "infinity in scales": Bad(put(SCALES, np.inf), ITS_SHARD, SCALES, "finite values", "1 NaN", "load"),
    "zero scale": Bad(put(SCALES, 0.0), ITS_SHARD, SCALES, "positive scales", "0", "load"),
    "zero scale below zero": Bad(put(SCALES, -0.0), ITS_SHARD, SCALES, "positive scales", "-0", "load"),
    "negative scale": Bad(put(SCALES, -0.25), ITS_SHARD, SCALES, "positive scales", "-0.25", "load"),
    "scale that makes infinities": Bad(
        put(SCALES, 3e38), ITS_SHARD, SCALES, "scales up to 7.5", "3e+38", "load"
    ),
    "MTP embedding that is no copy": Bad(
        put(f"{MTP}.embed_tokens.weight", 0.5, at=7),
        ITS_SHARD,
        f"{MTP}.embed_tokens.weight",
        f"a copy of {EMBEDDING}",
        "other values",
        "load",
    ),
    "MTP head that is no copy": Bad(
        put(f"{MTP}.shared_head.head.weight", 0.5),
        ITS_SHARD,
        f"{MTP}.shared_head.head.weight",
        f"a copy of {HEAD}",
        "other values",
        "load",
    ),
    # Digests
    "wrong digest of a shard": Bad(
        wrong_sum(SECOND), SECOND, "", f"the SHA-256 {'0' * 16}... of {SUMS}", "...", "load"
    ),
    "wrong digest of the configuration": Bad(
        wrong_sum("config.json"), "config.json", "", f"the SHA-256 {'0' * 16}... of {SUMS}", "...", "load"
    ),
    "digest file with a line that is none": Bad(
        write(SUMS, b"abc  config.json\n"),
        SUMS,
        "line 1",
        "64 hexadecimal digits",
        '"abc  config.json"',
        "load",
    ),
    "digest file without names": Bad(
        write(SUMS, b"\n" + b"0" * 64 + b"\n"), SUMS, "line 2", "64 hexadecimal digits", "000", "load"
    ),
    "digest file that contradicts itself": Bad(
        write(SUMS, b"0" * 64 + b"  x\n" + b"1" * 64 + b" *x\n"),
        SUMS,
        "line 2",
        "one digest a file",
        '"x"',
        "load",
    ),
    "digest file not text": Bad(
        write(SUMS, b"\xff\xfe\x00"), SUMS, "", "a readable text file", "none", "load"
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint_is_refused(kind: str, directory: Path) -> None:
    assert_refused(BAD[kind], directory)


@pytest.mark.parametrize(
    "kind", ["NaN in the embedding", "NaN in an fp8 weight", "zero scale", "wrong digest of a shard"]
)
def test_verify_finds_what_load_finds(kind: str, directory: Path) -> None:
    BAD[kind].spoil(directory)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory).verify()
    assert caught.value.what == BAD[kind].what
