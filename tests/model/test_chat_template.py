"""Chat templates, good and bad. What a probe should give is written out here, not taken from our encoding."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from model.chat_template import Probe, check_chat_template, check_tokenizer_vocab
from model.errors import CheckpointError
from tests.checkpoints import DEMO

TEMPLATE: str = json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"]
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
HELLO = [{"role": "user", "content": "Hello"}]


def probe(name: str, messages: Sequence[dict[str, Any]], expected: str, **variables: Any) -> Probe:
    given = {
        "messages": list(messages),
        "add_generation_prompt": True,
        "thinking": False,
        "bos_token": BOS,
        **variables,
    }
    return Probe(name, given, expected)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {
    "id": "call_0",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Köln", "note": "a<b & c"}'},
}
PROBES = [
    probe("hello", HELLO, f"{BOS}{USER}Hello{ASSISTANT}</think>"),
    probe("thinking", HELLO, f"{BOS}{USER}Hello{ASSISTANT}<think>", thinking=True),
    probe("no answer", HELLO, f"{BOS}{USER}Hello", add_generation_prompt=False),
    probe(
        "history",
        [
            turn("system", "Be brief."),
            turn("user", "1+1?\n"),
            turn("assistant", "thoughts</think>2"),
            turn("user", "Sure?"),
        ],
        f"{BOS}Be brief.{USER}1+1?\n{ASSISTANT}</think>2{EOS}{USER}Sure?{ASSISTANT}</think>",
    ),
    probe(
        "tools",
        [turn("user", "Rain?"), turn("assistant", "", tool_calls=[CALL]), turn("tool", "no")],
        f"{BOS}{USER}Rain?{ASSISTANT}</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        f"{CALL['function']['arguments']}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"  # type: ignore[index]
        "<｜tool▁output▁begin｜>no<｜tool▁output▁end｜>",
    ),
]
ONE = PROBES[:1]


def refusal(template: object, probes: Sequence[Probe] = ONE, **limits: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        check_chat_template(template, probes, **limits)
    error = caught.value
    assert (error.file, error.what) == ("tokenizer_config.json", "chat_template")
    assert str(error).splitlines() == [str(error)]
    assert len(str(error)) < 600
    return error


def test_the_demos_template_renders_every_probe() -> None:
    check_chat_template(TEMPLATE, PROBES)


def test_dictionaries_of_arguments_become_json_as_transformers_writes_it() -> None:
    """No escapes for HTML or for other alphabets, which Jinja's own filter has."""
    call = {"function": {"name": "f", "arguments": {"city": "Köln", "note": "a<b & c"}}}
    expected = f'{BOS}{USER}x{ASSISTANT}</think>{{"city": "Köln", "note": "a<b & c"}}'
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\n<｜User｜>{{ m.content }}{% else %}"
        "<｜Assistant｜></think>{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{% endfor %}"
    )
    messages = [turn("user", "x"), turn("assistant", "", tool_calls=[call])]
    check_chat_template(template, [probe("arguments", messages, expected)])


def test_loop_controls_and_trimmed_blocks() -> None:
    template = "{{ bos_token }}\n  {% for m in messages %}\n{{ m.content }}\n    {% break %}\n{% endfor %}"
    check_chat_template(template, [probe("break", HELLO * 2, f"{BOS}\nHello\n")])


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ 'open", "{% endfor %}", "{{ a | nofilter }}", "{% x %}"]
)
def test_does_not_compile(template: str) -> None:
    error = refusal(TEMPLATE + "\n" + template)
    assert error.expected == "a template that compiles"
    assert error.found.endswith(f"in line {TEMPLATE.count(chr(10)) + 2}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",  # 10^10 rounds
        "{{ 10 ** (10 ** 9) }}",  # in C, and while compiling, as it is a constant
    ],
)
def test_exceeds_its_time(template: str) -> None:
    start = time.monotonic()
    error = refusal(template, cpu_seconds=1)
    assert error.expected == "a template that renders within 1 s of CPU time and 512 MiB"
    assert error.found == "more CPU time"
    assert time.monotonic() - start < 20  # on a machine that is busy with other things


def test_exceeds_its_time_on_the_clock() -> None:
    error = refusal(TEMPLATE, deadline_seconds=0.001)
    assert error.found == "none after 0.001 s"


@pytest.mark.parametrize("template", ["{{ 'a' * 2000000000 }}", "{{ '%2000000000d' % 1 }}"])
def test_exceeds_its_memory(template: str) -> None:
    assert refusal(template).found == "more memory"


def test_recurses_without_end() -> None:
    error = refusal("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    assert error.found.startswith("RecursionError")


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ().__class__ }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ messages['__init__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update({'content': 'x'}) %}",
    ],
)
def test_reaches_out_of_its_sandbox(escape: str) -> None:
    """Though the rest is right: by itself Jinja renders some of these as an empty text."""
    error = refusal(TEMPLATE + escape)
    assert error.expected == "a template that stays in its sandbox"


def test_files_are_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    error = refusal(f"{{% include '{tmp_path}/secret' %}}")
    assert error.found.startswith("TypeError")


@pytest.mark.parametrize(
    ("template", "expected", "found"),
    [
        (TEMPLATE + " ", "'' at character 55 of the probe 'hello'", "' '"),
        (
            TEMPLATE.replace("<｜User｜>", "<|User|>"),
            "'｜User｜>Hello<｜Assistant｜></think>' at character 22",
            "'|User",
        ),
        (TEMPLATE + "\n\n\nx", "'' at character 55", r"'\n\nx'"),
        ("", f"'{BOS}{USER}", "''"),
        ("{{ 'x' * 10000000 }}", f"'{BOS}{USER}", f"'{'x' * 40}'"),
    ],
)
def test_renders_something_else(template: str, expected: str, found: str) -> None:
    error = refusal(template)
    assert error.expected.startswith(expected)
    assert error.found.startswith(found)


def test_the_probe_that_differs_is_named() -> None:
    for number, changed in enumerate(PROBES):
        others = [
            *PROBES[:number],
            Probe(changed.name, changed.variables, changed.expected + "!"),
            *PROBES[number:],
        ]
        assert f"of the probe {changed.name!r}" in refusal(TEMPLATE, others).expected


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ foo.bar }}", "UndefinedError: \"'foo' is undefined\""),
        ("{{ raise_exception('no\nuse') }}", r"TemplateError: 'no\nuse'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: 'division by zero'"),
        ("{{ range(1000000) }}", "OverflowError: 'Range too big"),
    ],
)
def test_fails_while_rendering(template: str, found: str) -> None:
    assert refusal(template).found.startswith(found)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, "a NoneType"),
        ([{"name": "default", "template": TEMPLATE}], "a list"),
        (3, "a int"),
        (b"", "a bytes"),
    ],
)
def test_is_no_text(template: object, found: str) -> None:
    error = refusal(template)
    assert (error.expected, error.found) == ("a Jinja template as text", found)


def test_is_too_long() -> None:
    assert refusal("x" * 300_000).expected == "at most 262144 characters"


def test_characters_that_no_terminal_shows_are_escaped() -> None:
    assert refusal("\x1b[2J\ud800\u2028").found == r"'\x1b[2J\ud800\u2028'"


def test_environment_and_working_directory_stay_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not the json that was meant')")
    monkeypatch.chdir(tmp_path)
    check_chat_template(TEMPLATE, ONE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check_chat_template(TEMPLATE, ONE)


def test_an_interpreter_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/nonexistent"])
    error = refusal(TEMPLATE)
    assert error.found.startswith("an end with code 1")
    assert "ModuleNotFoundError" in error.found


@pytest.mark.parametrize("num_ids", [0, 8191, 8192])
def test_token_ids_within_the_embedding(num_ids: int) -> None:
    check_tokenizer_vocab(num_ids, 8192)


def test_more_token_ids_than_rows_of_the_embedding() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_tokenizer_vocab(8193, 8192)
    error = caught.value
    assert (error.file, error.what, error.found) == ("tokenizer.json", "vocabulary", "8193")
    assert error.expected == "at most 8192 ids, the rows of model.embed_tokens.weight"
