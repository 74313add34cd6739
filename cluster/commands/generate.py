"""`eightfold generate`: continue one prompt."""

import json
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace

from cluster.commands.common import (
    checkpoint_directory,
    engine_config,
    load_model,
    read_prompt_ids,
    sampling_params,
)
from model.errors import RequestError
from model.stopping import FinishReason
from model.tokenizer import TOKENIZER_FILE, Detokenizer, Tokenizer
from workers.answer import TextAnswer
from workers.engine import Engine
from workers.sequence import Request, Token


def run(options: Namespace) -> int:
    """Generate, and print the text as it comes or one JSON object at the end."""
    params = replace(
        sampling_params(options, options.max_tokens), stop=tuple(options.stop), ignore_eos=options.ignore_eos
    )
    config = engine_config(options)
    tokenizer = load_tokenizer(options)
    if options.prompt_ids:
        prompt_ids = read_prompt_ids(options.prompt_ids)
    else:
        assert tokenizer, "load_tokenizer refuses"
        prompt_ids = tokenizer.encode(options.prompt)
        if prompt_ids[:1] != [tokenizer.bos_id]:
            prompt_ids = [tokenizer.bos_id, *prompt_ids]

    model = load_model(options)
    request = Request("cli", tuple(prompt_ids), params)
    engine = model.engine(config, len(prompt_ids) + params.max_tokens)
    report = generate(engine, request, tokenizer, stream=not options.json)
    if options.json:
        print(json.dumps(asdict(report), ensure_ascii=False))
    else:
        print(f"\n{report.summary()}", file=sys.stderr)
    return 0


def load_tokenizer(options: Namespace) -> Tokenizer | None:
    """The directory's tokenizer, or None where random weights lie beside none.

    Raises:
        RequestError: there is none, and options about text.
    """
    directory = checkpoint_directory(options.model)
    if options.weights == "checkpoint" or (directory / TOKENIZER_FILE).exists():
        return Tokenizer.load(directory)
    if options.prompt is not None or options.stop:
        field = "--stop" if options.prompt is None else "--prompt"
        problem = f"needs a {TOKENIZER_FILE}, which {directory.name} has not: use --prompt-ids"
        raise RequestError(field, problem)
    return None


class IdAnswer:
    """As `TextAnswer` where there is no tokenizer: the ids themselves, in digits."""

    stopped = False

    def push(self, token: Token) -> str:
        return f"{token.token_id}" if token.finish_reason else f"{token.token_id} "


@dataclass(frozen=True)
class Report:
    """What `--json` prints. Seconds count from the request to its first token, and from there to the end.

    Without a tokenizer `text` is the output's ids in digits.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    drafted: int
    accepted: int
    acceptance_by_position: list[float]
    prefill_seconds: float
    decode_seconds: float

    def summary(self) -> str:
        """One line of figures for a person."""
        num_output = len(self.output_ids)
        line = f"{len(self.prompt_ids)} tokens in {self.prefill_seconds:.2f} s, then {num_output} tokens"
        if num_output > 1 and self.decode_seconds > 0:
            line += f" at {(num_output - 1) / self.decode_seconds:.0f} a second"
        if self.acceptance_by_position:
            rates = ", ".join(f"{rate:.0%}" for rate in self.acceptance_by_position)
            line += f", drafts accepted by position: {rates}"
        return line


def generate(engine: Engine, request: Request, tokenizer: Tokenizer | None, *, stream: bool) -> Report:
    """Run one request to its end, printing the text as it comes if asked to."""
    answer = TextAnswer(Detokenizer(tokenizer), request) if tokenizer else IdAnswer()
    tokens: list[Token] = []
    text = ""
    engine.add(request)
    started = first = time.perf_counter()
    while not engine.is_idle and not answer.stopped:
        for token in engine.step():
            if not tokens:
                first = time.perf_counter()
            tokens.append(token)
            piece = answer.push(token)
            text += piece
            if stream:
                print(piece, end="", flush=True)
            if answer.stopped:
                break
    engine.cancel(request.uid)
    return Report(
        prompt_ids=list(request.prompt_ids),
        output_ids=[token.token_id for token in tokens],
        text=text,
        finish_reason="stop" if answer.stopped else tokens[-1].finish_reason,
        drafted=sum(engine.acceptance.drafted),
        accepted=sum(engine.acceptance.accepted),
        acceptance_by_position=engine.acceptance.rates(),
        prefill_seconds=first - started,
        decode_seconds=time.perf_counter() - first,
    )
