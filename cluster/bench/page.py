"""The result as one HTML page that loads nothing and runs no script; made of the JSON alone."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.plot import Line, number, plot

Json = dict[str, Any]

_STYLE = Path(__file__).parent / "page.css"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_LATENCIES = ("ttft", "tpot", "itl", "e2e")
_NAMES = {
    "ttft": "Time to first token", "tpot": "Time per output token", "itl": "Inter-token latency",
    "e2e": "End to end",
}  # fmt: skip
_RANKS = ("mean", "p50", "p90", "p95", "p99", "max")


def render(result: Json) -> str:
    """The page of a result, as `result_json` makes it."""
    sections = [
        _head(result),
        _percentiles(result),
        _capacity(result),
        _plots("Over time", _client_plots(result)),
        _plots("The server's own view", _server_plots(result), result["server"]["not_offered"]),
        _failures(result),
        _settings(result),
    ]
    title = f"{result['model']} under load"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{html.escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _head(result: Json) -> str:
    summary = result["summary"]
    figures = {
        "requests due": number(summary["due"]),
        "answered": number(summary["completed"]),
        "failed": number(sum(summary["errors"].values())),
        "offered": f"{number(summary['offered'])}/s",
        "answered, a second": f"{number(summary['request_rate'])}/s",
        "tokens of answers": f"{number(summary['answer_token_rate'])}/s",
        "open, on average": number(summary["in_flight"]),
    }
    if any(limit is not None for limit in result["objectives"].values()):
        figures["goodput"] = f"{number(summary['goodput'])}/s"
        figures["met the objectives"] = f"{summary['attainment']:.1%}"
    said = [f"<p class=void><b>These figures are void:</b> {html.escape(why)}</p>" for why in result["void"]]
    said += [f"<p class=quiet>Note: {html.escape(note)}.</p>" for note in result["notes"]]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    settings = result["settings"]
    return (
        f"<h1>{html.escape(result['model'])} under load</h1>"
        f"<p class=quiet>{html.escape(str(settings.get('url', '')))}, {html.escape(result['started'])}, "
        f"{number(summary['duration'])} s measured</p>{''.join(said)}<dl class=figures>{cells}</dl>"
    )


def _percentiles(result: Json) -> str:
    summary, limits = result["summary"], result["objectives"]
    rows = [
        [_NAMES[name] + " (ms)", *_row(summary[name], 1e3), _milliseconds(limits.get(name))]
        for name in _LATENCIES
    ]
    rows += [
        ["Tokens of a prompt", *_row(summary["prompt_length"], 1), "-"],
        ["Tokens of an answer", *_row(summary["answer_length"], 1), "-"],
        ["Sent late (ms)", *_row(summary["late"], 1e3), "-"],
        ["Generator's loop late (ms)", *_row(summary["loop_delay"], 1e3), "-"],
    ]
    return f"<h2>Percentiles</h2>{_table(['', *_RANKS, 'objective'], rows)}"


def _row(found: Json | None, scale: float) -> list[str]:
    return [number(found[rank] * scale) if found else "-" for rank in _RANKS]


def _milliseconds(limit: float | None) -> str:
    return "-" if limit is None else number(limit * 1e3)


def _capacity(result: Json) -> str:
    capacity = result["capacity"]
    if capacity is None:
        return ""
    trials = sorted(capacity["trials"], key=lambda trial: float(trial["rate"]))
    rates = [trial["rate"] for trial in trials]
    rows = [
        [
            number(trial["rate"]), f"{trial['attainment']:.1%}", number(trial["goodput"]),
            "met" if trial["is_met"] else "not met", html.escape(trial["remark"]),
        ]
        for trial in trials
    ]  # fmt: skip
    found = capacity["highest"]
    said = f"<b>{number(found)}/s</b> meets the objectives" if found else "No rate tried meets the objectives"
    goodput = Line("goodput", [trial["goodput"] for trial in trials])
    share = Line("share", [trial["attainment"] * 100 for trial in trials])
    figures = [
        plot("Goodput", rates, [goodput], "arrivals/s", "a second"),
        plot("Objectives met", rates, [share], "arrivals/s", "%"),
    ]
    return (
        f"<h2>Capacity</h2><p>{said}; {html.escape(capacity['ended'])}. The rest of this page is of "
        f"the highest rate that does, or of the last one tried.</p>"
        f"{_table(['arrivals/s', 'met', 'goodput/s', '', ''], rows)}<div class=plots>{''.join(figures)}</div>"
    )


def _client_plots(result: Json) -> list[str]:
    columns, ranks = result["series"], list(range(101))
    at = columns["at"]
    figures = []
    for name in _LATENCIES:
        lines = [Line(rank, _scaled(columns[f"{name}_{rank}"], 1e3)) for rank in ("p50", "p90", "p99")]
        figures.append(plot(_NAMES[name], at, lines, "s", "ms"))
    rates = [Line(name, columns[name]) for name in ("due", "completed", "failed")]
    figures.append(plot("Requests", at, rates, "s", "a second"))
    figures.append(plot("Tokens of answers", at, [Line("tokens", columns["answer_tokens"])], "s", "a second"))
    figures.append(plot("Open requests", at, [Line("open", columns["open"])], "s", "requests"))
    for name in ("ttft", "e2e"):
        if values := result["distribution"][name]:
            title = f"{_NAMES[name]}, all requests"
            figures.append(plot(title, ranks, [Line(name, _scaled(values, 1e3))], "percentile", "ms"))
    return figures


def _server_plots(result: Json) -> list[str]:
    samples = result["server"]["samples"]
    if not samples:
        return []
    at = samples["at"]
    roles = sorted({role for counts in samples["replicas"] for role in counts})
    replicas = [Line(role, [counts.get(role, 0) for counts in samples["replicas"]]) for role in roles]
    pages = [Line("in use", samples["pages_used"]), Line("all", samples["pages"])]
    requests = [Line("waiting", samples["waiting"]), Line("running", samples["running"])]
    return [
        plot("Replicas", at, replicas, "s", "actors"),
        plot("Pages", at, pages, "s", "pages"),
        plot("Requests in the server", at, requests, "s", "requests"),
        plot("Queue", at, [Line("tokens of prompts not run", samples["queued_tokens"])], "s", "tokens"),
        plot("Tokens drawn", at, [Line("tokens", samples["tokens_rate"])], "s", "a second"),
    ]


def _plots(title: str, figures: Sequence[str], missing: str | None = None) -> str:
    said = f"<p class=quiet>Not offered: {html.escape(missing)}.</p>" if missing else ""
    return f"<h2>{html.escape(title)}</h2>{said}<div class=plots>{''.join(figures)}</div>"


def _failures(result: Json) -> str:
    if not result["failures"]:
        return ""
    rows = [
        [html.escape(kind), number(entry["count"]), html.escape(entry["first"])]
        for kind, entry in result["failures"].items()
    ]
    return f"<h2>Failures</h2>{_table(['kind', 'requests', 'what the first said'], rows)}"


def _settings(result: Json) -> str:
    rows = [[html.escape(name), html.escape(str(value))] for name, value in result["settings"].items()]
    return f"<h2>Settings</h2>{_table(['', ''], rows)}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; text that is no number goes to the left."""
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(text: str) -> str:
    is_number = text[:1].isdigit() or text in ("", "-")
    return f"<td>{text}</td>" if is_number else f"<td class=text>{text}</td>"


def _scaled(values: Sequence[float | None], scale: float) -> list[float | None]:
    return [None if value is None else value * scale for value in values]
