"""What the dashboard shows: each panel answers a question with one or more queries over docs/metrics.md."""

from dataclasses import dataclass

# Every gateway shows all workers, so each is counted once. `job` is what Prometheus calls one cluster.
_JOB = 'job=~"$job"'
_RATE = "$__rate_interval"


def _rate(metric: str, labels: str = "") -> str:
    """Of a counter that each gateway has for itself."""
    return f"rate({metric}{{{', '.join(filter(None, (labels, _JOB)))}}}[{_RATE}])"


def _workers(metric: str, labels: str = "", by: str = "role, worker") -> str:
    """A gauge of workers, each once."""
    return f"max by ({by}) ({metric}{{{', '.join(filter(None, (labels, _JOB)))}}})"


def _worker_rate(metric: str, labels: str = "", by: str = "role, worker") -> str:
    """The rate of a counter of workers, each once."""
    return f"max by ({by}) ({_rate(metric, labels)})"


def _quantile(share: float, histogram: str) -> str:
    return f"histogram_quantile({share}, sum by (le) ({_rate(f'{histogram}_bucket')}))"


@dataclass(frozen=True)
class Query:
    """One line of a panel; `legend` may hold labels as `{{role}}`."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A graph over time. `unit` is Grafana's name of it."""

    title: str
    question: str
    unit: str
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Row:
    """Panels beside each other, under a title."""

    title: str
    panels: tuple[Panel, ...]


_TTFT, _ITL = "eightfold_time_to_first_token_seconds", "eightfold_time_between_tokens_seconds"
_QUANTILES = (0.5, 0.95, 0.99)
_HITS = _rate("eightfold_prompt_tokens_total", 'cache="hit"')
_ANSWERS = _rate("eightfold_answer_tokens_total")
_MISSES = _rate("eightfold_prompt_tokens_total", 'cache="miss"')
_TOKENS = "eightfold_worker_tokens_total"
_COPIES = "eightfold_worker_dispatched_copies_total"
_OF_EXPERTS = f"sum by (expert_worker) ({_worker_rate(_COPIES, by='role, worker, expert_worker')})"
_PER_MILLION = "* 3600 / 1e6"


def _quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(Query(_quantile(share, histogram), f"p{share * 100:g}") for share in _QUANTILES)


def _per(part: str, whole: str, by: str) -> str:
    """How much of one counter there is for one of another, by some labels."""
    return f"sum by ({by}) ({_worker_rate(part)}) / sum by ({by}) ({_worker_rate(whole)})"


def _drafts(state: str) -> str:
    drafts = _worker_rate("eightfold_worker_drafts_total", f'state="{state}"', "role, worker, place")
    return f"sum by (place) ({drafts})"


ROWS = (
    Row(
        "What clients feel",
        (
            Panel("Time to first token", "How long do clients wait?", "s", _quantiles(_TTFT)),
            Panel("Time between tokens", "How fast do answers flow?", "s", _quantiles(_ITL)),
            Panel(
                "Requests by outcome", "Who gets an answer, and who what else?", "reqps",
                (
                    Query(f"sum by (outcome) ({_rate('eightfold_requests_total')})", "{{outcome}}"),
                    Query(f"sum({_rate('eightfold_replays_total')})", "run again"),
                ),
            ),
        ),
    ),
    Row(
        "Queue and room",
        (
            Panel(
                "Open requests", "How long is the queue?", "short",
                (Query(f'sum by (phase) (eightfold_requests_open{{{_JOB}}})', "{{phase}}"),),
            ),
            Panel(
                "Prompt tokens before workers", "Whose queue is it?", "short",
                (Query(_workers("eightfold_worker_queued_tokens"), "{{role}} {{worker}}"),),
            ),
            Panel(
                "Pages by state", "How much room is left?", "short",
                (
                    Query(
                        "sum by (role, state) ("
                        f"{_workers('eightfold_worker_pages', by='role, worker, state')})",
                        "{{role}} {{state}}",
                    ),
                ),
            ),
        ),
    ),
    Row(
        "Engines",
        (
            Panel(
                "Engines by state", "How many are there, how many shall there be?", "short",
                (
                    Query(
                        f"max by (role, state) (eightfold_engines{{{_JOB}}})", "{{role}} {{state}}"
                    ),
                    Query(f"max by (role) (eightfold_engines_wanted{{{_JOB}}})", "{{role}} wanted"),
                ),
            ),
            Panel(
                "Engines needed, by reason", "What is short, where it scales?", "short",
                (
                    Query(
                        f"max by (role, reason) (eightfold_scaling_need{{{_JOB}}})", "{{role}} {{reason}}"
                    ),
                ),
            ),
            Panel(
                "Predicted against objective", "Are objectives kept?", "s",
                (
                    Query(f"max by (role) (eightfold_scaling_predicted_seconds{{{_JOB}}})", "{{role}}"),
                    Query(
                        f"max by (role) (eightfold_scaling_objective_seconds{{{_JOB}}})",
                        "{{role}} objective",
                    ),
                ),
            ),
            Panel(
                "Decisions an hour, and failed starts", "Does it swing? Do engines come up?", "short",
                (
                    Query(
                        "max by (role, direction, reason) ("
                        f"increase(eightfold_scaling_decisions_total{{{_JOB}}}[1h]))",
                        "{{role}} {{direction}}: {{reason}}",
                    ),
                    Query(
                        f"max by (role) (increase(eightfold_engine_failed_starts_total{{{_JOB}}}[1h]))",
                        "{{role}} failed starts",
                    ),
                ),
            ),
        ),
    ),
    Row(
        "Steps",
        (
            Panel(
                "Tokens a second", "What comes out?", "short",
                (Query(f"sum by (role) ({_worker_rate(_TOKENS)})", "{{role}}"),),
            ),
            Panel(
                "Tokens a step", "How full are batches?", "short",
                (Query(_per(_TOKENS, "eightfold_worker_steps_total", "role"), "{{role}}"),),
            ),
            Panel(
                "Accepted drafts by place", "Do drafts pay?", "percentunit",
                (Query(f"{_drafts('accepted')} / {_drafts('judged')}", "place {{place}}"),),
            ),
        ),
    ),
    Row(
        "Hand-over from prefill to decode",
        (
            Panel(
                "Bytes of pages", "How much travels?", "Bps",
                (Query(_worker_rate("eightfold_worker_hand_over_bytes_total"), "{{worker}}"),),
            ),
            Panel(
                "Mean time from first token to adoption", "How long is the gap?", "s",
                (
                    Query(
                        _per(
                            "eightfold_worker_hand_over_seconds_sum",
                            "eightfold_worker_hand_over_seconds_count",
                            "worker",
                        ),
                        "{{worker}}",
                    ),
                ),
            ),
            Panel(
                "Stray messages", "Do pages come too late?", "short",
                (Query(_worker_rate("eightfold_worker_stray_messages_total"), "{{worker}}"),),
            ),
        ),
    ),
    Row(
        "Experts",
        (
            Panel(
                "Nodes a token", "How far does a token travel?", "short",
                (
                    Query(
                        f"sum({_worker_rate(_COPIES, by='role, worker, expert_worker')}) / "
                        f"sum({_worker_rate('eightfold_worker_dispatched_tokens_total')})",
                        "mean",
                    ),
                    Query(f"max({_workers('eightfold_worker_nodes_per_token_max')})", "most"),
                ),
            ),
            Panel(
                "Imbalance: the busiest expert worker against the mean", "Do all work alike?", "short",
                (Query(f"max({_OF_EXPERTS}) / avg({_OF_EXPERTS})", "busiest / mean"),),
            ),
            Panel(
                "Who is there", "Is anybody missing?", "short",
                (
                    Query(f"max by (role) (eightfold_workers{{{_JOB}}})", "{{role}}"),
                    Query(f"max(eightfold_expert_workers{{{_JOB}}})", "experts"),
                    Query(f"sum(eightfold_ready{{{_JOB}}})", "ready gateways"),
                    Query(f"max(changes(eightfold_epoch{{{_JOB}}}[1h]))", "new placements an hour"),
                ),
            ),
        ),
    ),
    Row(
        "Prefix cache and money",
        (
            Panel(
                "Prompt tokens found in pages", "How much is not computed twice?", "percentunit",
                (Query(f"sum({_HITS}) / (sum({_HITS}) + sum({_MISSES}))", "of all"),),
            ),
            Panel(
                "Saved by hits, $ an hour", "What do hits spare clients, at the prices above?", "currencyUSD",
                (Query(f"sum({_HITS}) * ($price_miss - $price_hit) {_PER_MILLION}", "saved"),),
            ),
            Panel(
                "Worth of what is served, $ an hour", "What is it sold for, at the prices above?",
                "currencyUSD",
                (
                    Query(f"sum({_HITS}) * $price_hit {_PER_MILLION}", "hits"),
                    Query(f"sum({_MISSES}) * $price_miss {_PER_MILLION}", "misses"),
                    Query(f"sum({_ANSWERS}) * $price_answer {_PER_MILLION}", "answers"),
                ),
            ),
        ),
    ),
)  # fmt: skip
