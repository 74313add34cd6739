"""Any edit of a checkpoint's files leaves a good one, or one that is refused by a readable line."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint, routed_experts
from model.errors import CheckpointError
from tests.checkpoints import fp8_facts
from tests.model.bad_checkpoints import FIRST, INDEX, assert_readable, raw
from tests.model.bad_checkpoints import directory as directory
from tests.model.bad_checkpoints import good as good

pytestmark = pytest.mark.usefixtures("one_thread")

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "delete", "insert", "repeat"]), st.integers(0, 1 << 30), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    result = bytearray(content)
    for kind, place, byte in edits:
        at = place % max(1, len(result))
        match kind:
            case "flip":
                result[at : at + 1] = bytes([result[at] ^ (1 << byte % 8)]) if result else b""
            case "delete":
                del result[at : at + byte]
            case "insert":
                result[at:at] = bytes([byte])
            case "repeat":
                result[at:at] = result[at : at + byte]
    return bytes(result)


def assert_refused_or_good(directory: Path) -> None:
    try:
        Checkpoint.open(directory).load(routed_experts(range(1)), dtype=torch.float32)
    except CheckpointError as error:
        assert_readable(error, directory)


fuzz = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@fuzz
@given(edits=EDITS, keep_length=st.booleans())
def test_any_edit_of_a_header(
    edits: list[tuple[str, int, int]], keep_length: bool, good: Path, directory: Path
) -> None:
    """The length in front of it is right for the new header, or stays as it was."""
    header, data = raw(good / FIRST)
    length = len(header) if keep_length else len(edited(header, edits))
    (directory / FIRST).write_bytes(struct.pack("<Q", length) + edited(header, edits) + data)
    assert_refused_or_good(directory)


@fuzz
@given(edits=EDITS, file=st.sampled_from(["config.json", INDEX]))
def test_any_edit_of_a_json_file(
    edits: list[tuple[str, int, int]], file: str, good: Path, directory: Path
) -> None:
    for name in ("config.json", INDEX):
        shutil.copy(good / name, directory / name)
    (directory / file).write_bytes(edited((good / file).read_bytes(), edits))
    assert_refused_or_good(directory)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@fuzz
@given(key=st.sampled_from([*sorted(fp8_facts()), "rope_parameters", "yarn"]), value=JSON)
def test_any_value_of_a_configuration(key: str, value: Any, good: Path, directory: Path) -> None:
    config = {**json.loads((good / "config.json").read_text()), key: value}
    (directory / "config.json").write_text(json.dumps(config))
    assert_refused_or_good(directory)
