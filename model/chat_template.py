"""Whether a checkpoint's text side fits the model and the chat encoding that this server writes by hand.

A checkpoint's `chat_template` is a program that came with the weights: it is never used to serve. It is only
asked whether it means the same as our own encoding, because if it does not, the model was taught another one.
The question is put in a process of its own, in Jinja's sandbox, with limits on CPU time, memory and time on
the clock, so that a template that loops, grows or reaches out is a refused checkpoint and no more.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2.ext
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import CheckpointError

_FILE, _KEY = "tokenizer_config.json", "chat_template"
_EXPECTED = "a template that renders what the server's own encoding does"
_MAX_TEMPLATE_CHARS = 1 << 18
_MAX_MEMORY_BYTES = 512 << 20
_SHOWN_CHARS = 40

_START = (
    "import json, sys; sys.path = json.loads(sys.argv[1]); from model.chat_template import child; child()"
)


@dataclass(frozen=True)
class Probe:
    """One conversation, and what our own encoding makes of it.

    Attributes:
        name: how a message about it calls it.
        variables: what a template is given: `messages`, `add_generation_prompt`, `thinking`, `bos_token`, ...
    """

    name: str
    variables: Mapping[str, Any]
    expected: str


def check_chat_template(
    template: object, probes: Sequence[Probe], *, cpu_seconds: int = 2, deadline_seconds: float = 30.0
) -> None:
    """Check that a template renders every probe as expected.

    Args:
        template: the value of `chat_template`, whatever it is.
        cpu_seconds: of the whole check, the start of its process included.
        deadline_seconds: on the clock; longer, for a machine may be busy.

    Raises:
        CheckpointError: it is no text, does not compile, exceeds its budget, leaves the sandbox, fails, or
            renders something else.
    """
    if not isinstance(template, str):
        raise CheckpointError(_FILE, _KEY, "a Jinja template as text", f"a {type(template).__name__}")
    if len(template) > _MAX_TEMPLATE_CHARS:
        expected = f"at most {_MAX_TEMPLATE_CHARS} characters"
        raise CheckpointError(_FILE, _KEY, expected, f"{len(template)}")
    job = {
        "template": template,
        "variables": [dict(probe.variables) for probe in probes],
        "max_chars": [len(probe.expected) + _SHOWN_CHARS for probe in probes],
        "cpu_seconds": cpu_seconds,
    }
    answer = _ask(job, cpu_seconds, deadline_seconds)
    if "problem" in answer:
        raise CheckpointError(_FILE, _KEY, answer["expected"], answer["problem"])
    for probe, text in zip(probes, answer["texts"], strict=True):
        _compare(probe, text)


def check_tokenizer_vocab(num_ids: int, vocab_size: int) -> None:
    """Check that every token id (highest + 1) has a row in the embedding; more rows than ids are padding.

    Raises:
        CheckpointError: the tokenizer makes ids that the model has no row for.
    """
    if num_ids > vocab_size:
        expected = f"at most {vocab_size} ids, the rows of model.embed_tokens.weight"
        raise CheckpointError("tokenizer.json", "vocabulary", expected, f"{num_ids}")


def _ask(job: dict[str, Any], cpu_seconds: int, deadline_seconds: float) -> dict[str, Any]:
    """Run `child` in a process that is told where modules lie, and nothing else of ours."""
    path = json.dumps([entry for entry in sys.path if entry])
    within = f"a template that renders within {cpu_seconds} s of CPU time and {_MAX_MEMORY_BYTES >> 20} MiB"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _START, path],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=deadline_seconds,
            env={key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(_FILE, _KEY, within, f"none after {deadline_seconds:g} s") from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise CheckpointError(_FILE, _KEY, within, "more CPU time")
    try:
        return {"expected": within, **json.loads(done.stdout)}
    except ValueError:
        last_words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        found = f"an end with code {done.returncode} {last_words}"
        raise CheckpointError(_FILE, _KEY, within, found) from None


def _compare(probe: Probe, text: str) -> None:
    if text == probe.expected:
        return
    pairs = zip(probe.expected, text, strict=False)
    shorter = min(len(probe.expected), len(text))
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), shorter)
    ours, theirs = (whole[at : at + _SHOWN_CHARS] for whole in (probe.expected, text))
    expected = f"{ours!r} at character {at} of the probe {probe.name!r}"
    raise CheckpointError(_FILE, _KEY, expected, f"{theirs!r}")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which here refuses at once: by itself it makes a forbidden attribute an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")


def child() -> None:
    """What the process of its own does: render the probes within limits, and say how it went."""
    job = json.load(sys.stdin)
    limits = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: _MAX_MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (allowed, allowed))
    try:
        answer: dict[str, Any] = {"texts": _render(job)}
    except MemoryError:
        answer = {"problem": "more memory"}
    except TemplateSyntaxError as error:
        reason = f"{error.message!r} in line {error.lineno}"
        answer = {"expected": "a template that compiles", "problem": reason}
    except SecurityError as error:
        answer = {"expected": "a template that stays in its sandbox", "problem": str(error)[:200]}
    except Exception as error:  # whatever a template does wrong; it is named and nothing more
        answer = {"expected": _EXPECTED, "problem": f"{type(error).__name__}: {str(error)[:200]!r}"}
    sys.stdout.write(json.dumps(answer))


def _render(job: dict[str, Any]) -> list[str]:
    """The probes as transformers would render them: the same options, filters and globals."""

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(job["template"])
    pairs = zip(job["variables"], job["max_chars"], strict=True)
    return [template.render(variables)[:max_chars] for variables, max_chars in pairs]
