"""`eightfold trace`: one request seen from the inside, as JSON and as one HTML page."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from cluster.commands.common import (
    checkpoint_directory,
    engine_config,
    model_options,
    read_prompt_ids,
    sampling_params,
)
from cluster.trace.collect import TraceOptions, trace
from cluster.trace.page import render
from cluster.trace.recorder import WatchedModel
from cluster.trace.report import Report
from model.config import ModelConfig
from model.errors import RequestError
from model.tokenizer import Tokenizer
from workers.sequence import Request

_DEFAULT_JSON, _DEFAULT_HTML = Path("trace.json"), Path("trace.html")


def run(options: Namespace) -> int:
    """Run the request and write the files asked for, or both under their default names."""
    json_file, html_file = options.json, options.html
    if not json_file and not html_file:
        json_file, html_file = _DEFAULT_JSON, _DEFAULT_HTML
    _check_directory("--json", json_file)
    _check_directory("--html", html_file)
    directory = checkpoint_directory(options.model)
    trace_options = TraceOptions(nodes=options.nodes, max_rows=options.rows)
    trace_options.check(ModelConfig.load(directory).n_group)
    params = replace(
        sampling_params(options, options.max_tokens), stop=tuple(options.stop), ignore_eos=options.ignore_eos
    )
    config = engine_config(options)
    tokenizer = Tokenizer.load(directory)
    prompt_ids = _prompt_ids(options, tokenizer)

    model = WatchedModel.load(directory, model_options(options), progress=True)
    request = Request("trace", tuple(prompt_ids), params)
    name = directory.absolute().name
    report = trace(model, tokenizer, request, config, trace_options, name=name)
    if json_file:
        _write("--json", json_file, report.to_json())
    if html_file:
        _write("--html", html_file, render(report))
    print(_summary(report), file=sys.stderr)
    return 0


def _prompt_ids(options: Namespace, tokenizer: Tokenizer) -> list[int]:
    if options.prompt_ids:
        return read_prompt_ids(options.prompt_ids)
    prompt_ids = tokenizer.encode(_read_stdin() if options.prompt == "-" else options.prompt)
    return prompt_ids if prompt_ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *prompt_ids]


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError("PROMPT", f"byte {error.start} of the standard input is not UTF-8") from None


def _check_directory(option: str, file: Path | None) -> None:
    if file and not file.parent.is_dir():
        raise RequestError(option, f"{file.parent} is not a directory")


def _write(option: str, file: Path, text: str) -> None:
    try:
        num_bytes = file.write_bytes(text.encode())
    except OSError as error:
        raise RequestError(option, f"{file}: {error.strerror}") from None
    print(f"{file}: {num_bytes:,} bytes", file=sys.stderr)


def _summary(report: Report) -> str:
    """One line of figures for a person."""
    request, copies = report.request, report.routing.copies
    drafts = [draft for step in report.steps for draft in step.drafts]
    accepted = sum(draft.verdict == "accepted" for draft in drafts)
    seconds = sum(step.seconds.total for step in report.steps)
    return (
        f"{request.prompt_tokens} tokens and {request.output_tokens} more in {seconds:.2f} s, "
        f"{accepted} of {len(drafts)} drafts accepted, "
        f"{copies.sent:.2f} copies of a token a layer ({copies.unrestricted:.2f} without the limit on nodes)"
    )
