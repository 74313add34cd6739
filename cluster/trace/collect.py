"""Runs one request through an engine and collects what happened inside.

What bounds the size: a row in full detail takes up to `index_topk` positions a layer, 127,000 for V3.2. So
`max_rows` rows are kept, and in a context where rows choose no more than may have `max_positions` positions
in all, which for V3.2 is 31: the last row of the prompt, then the answer's in order, then the prompt's from
its end. All others are counted and let go. Of very long answers the later steps come without the times of
their layers, the later tokens without alternatives.
"""

from dataclasses import dataclass, replace

from cluster.trace.recorder import Pass, WatchedModel
from cluster.trace.report import (
    FORMAT,
    VERSION,
    Alternative,
    Coverage,
    Draft,
    Limits,
    ModelFacts,
    Output,
    Report,
    RequestFacts,
    Row,
    Seconds,
    Step,
    Tokens,
)
from cluster.trace.rows import Rows
from cluster.trace.tally import MAX_BUCKETS, RoutingTally, SelectionTally
from model.decoder import DTYPES
from model.errors import RequestError
from model.tokenizer import Detokenizer, Tokenizer
from workers.answer import TextAnswer
from workers.engine import Engine, EngineConfig
from workers.placement import ExpertPlacement
from workers.sequence import Request, Token
from workers.transport.protocol import Address

MAX_ROWS = 256
MAX_POSITIONS = 4_000_000  # 3 characters each at 128K tokens: 12 MB of a page
MAX_LAYER_SECONDS = 400_000  # 8 characters each
MAX_ALTERNATIVES = 10_000  # tokens with their alternatives, some 250 characters each
TOP_LOGPROBS = 5


@dataclass(frozen=True)
class TraceOptions:
    """How many nodes the expert groups are dealt out to, and how much is kept."""

    nodes: int = 8
    max_rows: int = MAX_ROWS
    max_positions: int = MAX_POSITIONS

    def check(self, num_groups: int) -> None:
        """Refuses what this model cannot have."""
        if not 1 <= self.nodes <= num_groups:
            raise RequestError(
                "--nodes", f"is {self.nodes}; {num_groups} groups go to 1 to {num_groups} nodes"
            )
        if self.max_rows < 1:
            raise RequestError("--rows", f"is {self.max_rows}; at least 1 is kept")


def trace(
    model: WatchedModel,
    tokenizer: Tokenizer,
    request: Request,
    config: EngineConfig,
    options: TraceOptions | None = None,
    *,
    name: str = "",
) -> Report:
    """Run one request to its end on an engine of its own.

    Raises:
        RequestError: the engine cannot run it.
    """
    options = options or TraceOptions()
    options.check(model.local.config.n_group)
    request = replace(request, params=replace(request.params, logprobs=TOP_LOGPROBS))
    longest = request.longest
    # What is too long is refused by the engine; no pages are made for it.
    context = min(longest, model.local.config.max_position_embeddings)
    engine = Engine(model.decoder(), model.local.cache(context), config)
    engine.add(request)
    model.recorder.take()  # what a failed request before this one left
    collector = Collector(model, tokenizer, request, options)
    answer = TextAnswer(Detokenizer(tokenizer), request)
    text = ""
    while not engine.is_idle and not answer.stopped:
        begin = model.recorder.clock.now()
        drawn = engine.step()
        end = model.recorder.clock.now()
        tokens = []
        for token in drawn:
            if not answer.stopped:  # what comes behind a stop string is no part of the answer
                tokens.append(token)
                text += answer.push(token)
        collector.add_step(begin, end, model.recorder.take(), tokens)
    engine.cancel(request.uid)
    reason = "stop" if answer.stopped else collector.tokens[-1].finish_reason
    return collector.report(config, text, reason, name)


class Collector:
    """Takes the steps of one request as they come, and makes the report."""

    def __init__(
        self, model: WatchedModel, tokenizer: Tokenizer, request: Request, options: TraceOptions
    ) -> None:
        self._model, self._tokenizer, self._request, self._options = model, tokenizer, request, options
        config = model.local.config
        self._num_prompt = len(request.prompt_ids)
        context = self._num_prompt + request.params.max_tokens
        workers = [Address(f"node-{number}") for number in range(options.nodes)]
        placement = ExpertPlacement.even(0, config.n_routed_experts, config.n_group, workers)
        self._routing = RoutingTally(config, placement)
        self._prompt_keys = SelectionTally(config.index_topk, context)
        self._answer_keys = SelectionTally(config.index_topk, context)
        self._is_sparse = model.local.options.attention == "sparse"
        max_rows = options.max_rows
        if self._is_sparse and context > config.index_topk:
            at_most = options.max_positions // (config.num_cached_layers * config.index_topk)
            max_rows = min(max_rows, max(1, at_most))
        index_topk = config.index_topk if self._is_sparse else None
        self._rows = Rows(self._num_prompt, max_rows, index_topk, self._routing)
        self._rows_run = self._rejected_rows = 0
        self._has_mtp = False
        self._decoder_layers = list(range(config.num_hidden_layers))
        self._steps: list[Step] = []
        self._outputs: list[Output] = []
        self.tokens: list[Token] = []

    def add_step(self, begin: float, end: float, passes: list[Pass], tokens: list[Token]) -> None:
        """One step of the engine: what ran between two times of the clock, and the tokens that it drew."""
        forward = next(run for run in passes if run.kind == "forward")
        is_prefill = not self.tokens
        drafts = [] if is_prefill else forward.token_ids[1:]
        drawn = [token.token_id for token in tokens]
        verdicts = judge(drafts, drawn)
        num_valid = len(forward.token_ids) - len(drafts) + verdicts.count("accepted")
        self._rows_run += num_valid
        self._rejected_rows += len(forward.token_ids) - num_valid
        self._count(forward, self._decoder_layers, num_valid)
        self._rows.add(forward, num_valid)
        # The first draft pass runs over the rows that stand; those after it feed guesses back.
        if first_draft := next((run for run in passes if run.kind == "draft"), None):
            self._has_mtp = True
            self._count(first_draft, [len(self._decoder_layers)], num_valid)
            self._rows.complete(first_draft, num_valid)
        for index, token in enumerate(tokens):
            drafted = index < len(verdicts) and verdicts[index] == "accepted"
            self._outputs.append(self._output(token, drafted))
        self.tokens.extend(tokens)
        self._steps.append(
            Step(
                phase="prefill" if is_prefill else "decode",
                start=forward.start,
                rows=len(forward.token_ids),
                drafts=tuple(
                    Draft(token_id, self._text(token_id), verdict)
                    for token_id, verdict in zip(drafts, verdicts, strict=True)
                ),
                drawn=tuple(drawn),
                seconds=_seconds(begin, end, passes, with_layers=self._has_layer_seconds()),
            )
        )

    def report(self, config: EngineConfig, text: str, finish_reason: str | None, name: str) -> Report:
        """Everything so far."""
        ids = (*self._request.prompt_ids, *(token.token_id for token in self.tokens))
        rows = self._rows.chosen()
        itemsize = DTYPES[self._model.local.options.dtype].itemsize
        return Report(
            format=FORMAT,
            version=VERSION,
            model=self._model_facts(name),
            request=self._request_facts(config, text, finish_reason),
            tokens=Tokens(ids, self._texts(ids)),
            outputs=tuple(self._outputs),
            rows=rows,
            coverage=self._coverage(len(ids)),
            routing=self._routing.routing(itemsize, self._rejected_rows),
            steps=tuple(self._steps),
            limits=self._limits(rows),
        )

    def _count(self, run: Pass, layers: list[int], num_valid: int) -> None:
        of_prompt = run.start < self._num_prompt  # no pass has rows of both
        keys = self._prompt_keys if of_prompt else self._answer_keys
        if self._is_sparse:
            for layer, selected in zip(layers, run.selected, strict=True):
                keys.add(layer, run.start, selected[:num_valid])
        for layer, routed in zip(self._moe_layers(layers), run.routed, strict=True):
            self._routing.add(layer, routed, slice(num_valid), of_prompt=of_prompt)

    def _moe_layers(self, layers: list[int]) -> list[int]:
        return [layer for layer in layers if not self._model.local.config.is_dense(layer)]

    def _output(self, token: Token, drafted: bool) -> Output:
        assert token.logprobs
        return Output(
            position=token.position,
            step=len(self._steps),
            drafted=drafted,
            logprob=round(token.logprobs.logprob, 4),
            top=tuple(
                Alternative(token_id, self._text(token_id), round(logprob, 4))
                for token_id, logprob in token.logprobs.top
                if len(self._outputs) < MAX_ALTERNATIVES
            ),
        )

    def _coverage(self, length: int) -> Coverage:
        bucket = -(-length // MAX_BUCKETS)
        layers = self._layers()
        return Coverage(
            bucket=bucket,
            prompt=tuple(self._prompt_keys.shares(layer, bucket, length) for layer in layers),
            answer=tuple(self._answer_keys.shares(layer, bucket, length) for layer in layers),
        )

    def _layers(self) -> list[int]:
        """Layers that ran: the MTP module's only where it drafted."""
        return self._decoder_layers + [len(self._decoder_layers)] * self._has_mtp

    def _model_facts(self, name: str) -> ModelFacts:
        local = self._model.local
        config = local.config
        return ModelFacts(
            name=name,
            digest=local.checkpoint.digest,
            layers=config.num_hidden_layers,
            has_mtp=self._has_mtp,
            moe_layers=tuple(self._moe_layers(self._layers())),
            index_topk=config.index_topk,
            experts=config.n_routed_experts,
            experts_per_token=config.num_experts_per_tok,
            groups=config.n_group,
            topk_group=config.topk_group,
            dtype=local.options.dtype,
            pages=local.options.pages,
            attention=local.options.attention,
        )

    def _request_facts(self, config: EngineConfig, text: str, finish_reason: str | None) -> RequestFacts:
        params = self._request.params
        return RequestFacts(
            prompt_tokens=self._num_prompt,
            output_tokens=len(self.tokens),
            finish_reason=finish_reason,
            text=text,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            seed=params.seed,
            drafts=config.num_drafts,
            chunk=config.chunk,
        )

    def _limits(self, rows: tuple[Row, ...]) -> Limits:
        notes = []
        if len(rows) < self._rows_run:
            notes.append(
                f"{len(rows)} of {self._rows_run} rows are here in full: the prompt's last, then the "
                f"answer's in order, then the prompt's from its end, up to {self._options.max_rows} rows and "
                f"{self._options.max_positions:,} selected positions. All rows are in the counts of coverage "
                "and routing."
            )
        if len(self.tokens) > MAX_ALTERNATIVES:
            notes.append(f"Alternatives are here for the first {MAX_ALTERNATIVES:,} tokens of the answer.")
        if not self._has_layer_seconds():
            notes.append("The later steps have no times of their layers.")
        if not self._is_sparse:
            notes.append("Attention was dense: every position was read and nothing was selected.")
        num_positions = sum(len(selected) for row in rows for selected in row.selected if selected)
        return Limits(self._rows_run, len(rows), num_positions, self._options.max_positions, tuple(notes))

    def _has_layer_seconds(self) -> bool:
        """Whether the next step may still bring the times of its layers."""
        return 2 * self._model.local.config.num_hidden_layers * len(self._steps) <= MAX_LAYER_SECONDS

    def _texts(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        """The text that each token completes."""
        detokenizer = Detokenizer(self._tokenizer, skip_special=False)
        texts = [detokenizer.push(token_id) for token_id in ids]
        texts[-1] += detokenizer.flush()
        return tuple(texts)

    def _text(self, token_id: int) -> str:
        """A token by itself; bytes that are no whole character as `\\xe2`."""
        return self._tokenizer.token_bytes(token_id).decode("utf-8", errors="backslashreplace")


def judge(drafts: list[int], drawn: list[int]) -> list[str]:
    """What became of each draft: they stand as far as they equal the model's own tokens."""
    num_accepted = 0
    while num_accepted < min(len(drafts), len(drawn)) and drafts[num_accepted] == drawn[num_accepted]:
        num_accepted += 1
    verdicts = ["accepted"] * num_accepted + ["unjudged"] * (len(drafts) - num_accepted)
    if num_accepted < min(len(drafts), len(drawn)):
        verdicts[num_accepted] = "rejected"
    return verdicts


def _seconds(begin: float, end: float, passes: list[Pass], *, with_layers: bool) -> Seconds:
    """Where a step's time went: its main pass and head, drawing, then everything from the first draft on."""
    forward = next(run for run in passes if run.kind == "forward")
    first_draft = next((run.begin for run in passes if run.kind == "draft"), end)
    head = next((run for run in passes if run.kind == "head" and run.begin < first_draft), None)
    main_end = head.end if head else forward.end
    return Seconds(
        total=round(end - begin, 6),
        forward=round(forward.end - forward.begin, 6),
        head=round(head.end - head.begin, 6) if head else 0.0,
        sample=round(first_draft - main_end, 6),
        draft=round(end - first_draft, 6),
        other=round(forward.begin - begin + (head.begin - forward.end if head else 0.0), 6),
        attention=tuple(round(seconds, 6) for seconds in forward.attention if with_layers),
        feed_forward=tuple(
            round(whole - attention, 6)
            for whole, attention in zip(forward.layers, forward.attention, strict=True)
            if with_layers
        ),
    )
