"""`eightfold status`: who is there, how busy, and what speculation and the prefix cache are worth."""

import json
import sys
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterable, Sequence

from cluster.autoscaling import RoleScaling
from cluster.cli import EXIT_FAILED
from cluster.gateway.backend import WorkerReport
from cluster.gateway.status import ClusterStatus
from model.errors import RequestError

_SECONDS = 10.0


def run(options: Namespace) -> int:
    """Ask a gateway and print what it says."""
    if not options.url.startswith(("http://", "https://")):
        raise RequestError("URL", f"is {options.url!r}; it begins with http:// or https://")
    request = urllib.request.Request(f"{options.url.rstrip('/')}/status")
    if options.key_file:
        try:
            key = options.key_file.read_text().strip()
        except OSError as error:
            raise RequestError("--key-file", f"{options.key_file}: {error.strerror}") from None
        request.add_header("Authorization", f"Bearer {key}")
    # No proxy: a gateway's status is asked for where it runs.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_SECONDS) as response:
            data = response.read()
        status = ClusterStatus.from_json(data)
    except urllib.error.HTTPError as error:
        print(f"eightfold status: {options.url} answered {error.code}: {_told(error)}", file=sys.stderr)
        return EXIT_FAILED
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or "it is no gateway of this version"
        print(f"eightfold status: {options.url}: {reason}", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(json.loads(data), indent=1) if options.json else as_text(status))
    return 0


def as_text(status: ClusterStatus) -> str:
    """A page for people."""
    state = "draining" if status.draining else "ready" if status.ready else "not ready"
    parts = status.parts
    head = [
        f"{status.model}  weights {status.weights_digest[:12]}  {state}  up {_duration(status.up_seconds)}",
        f"requests  {status.waiting} waiting, {status.running} running; "
        f"they may come to {status.journal_tokens:,} tokens",
        f"context   {status.context:,} tokens a request",
    ]
    workers = [_worker_row(worker) for worker in parts.workers]
    titles = [
        "worker", "role", "node", "pid", "waiting", "running", "pages used", "prompt tokens", "cache hits",
        "tokens", "steps", "drafts", "accepted", "nodes/token", "copies/token",
    ]  # fmt: skip
    out = [*head, "", *_table([titles, *workers])]
    if parts.experts:
        rows = [
            [expert.name, _groups(expert.first_group, expert.num_groups), expert.node, str(expert.pid)]
            for expert in parts.experts
        ]
        out += ["", f"experts, epoch {parts.epoch}", *_table([["actor", "groups", "node", "pid"], *rows])]
    if parts.scaling:
        out += ["", *_scaling(parts.scaling)]
    for role in parts.engines:
        if failure := role.last_failure:
            failed = f"{role.role}: {failure.in_a_row} engines in a row did not come up"
            out.append(f"{_clock(failure.at)}  {failed}: {failure.why}")
    return "\n".join(out)


def _scaling(roles: Sequence[RoleScaling]) -> list[str]:
    rows = [[one.role, str(one.engines), str(one.wanted), f"{one.need:.2f}", one.why] for one in roles]
    changes = sorted((change for one in roles for change in one.decisions), key=lambda change: change.at)
    told = [
        f"{_clock(change.at)}  {change.role} from {change.before} to {change.after}: {change.why}"
        for change in changes
    ]
    return [*_table([["scaling", "engines", "wanted", "needed", "because"], *rows]), *told]


def _worker_row(worker: WorkerReport) -> list[str]:
    status, load = worker.status, worker.status.load
    used = load.num_pages - load.free_pages
    return [
        worker.name,
        f"{status.role}, leaving" if status.leaving else status.role,
        worker.node,
        str(worker.pid),
        f"{load.waiting} ({load.queued_tokens:,} tokens)" if load.waiting else "0",
        str(load.running),
        f"{used:,} of {load.num_pages:,}",
        f"{status.prompt_tokens:,}",
        _share(status.hit_tokens, status.prompt_tokens),
        f"{status.tokens:,}",
        f"{status.steps:,}",
        str(status.num_drafts),
        " ".join(_share(*pair) for pair in zip(status.accepted, status.drafted, strict=True) if pair[1])
        or "-",
        f"at most {status.most_nodes}" if status.dispatched else "-",
        f"{status.copies / status.dispatched:.2f}" if status.dispatched else "-",
    ]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _groups(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first} to {first + count - 1}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _duration(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


def _table(rows: Iterable[list[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _told(error: urllib.error.HTTPError) -> str:
    """The message of a refusal, as far as it is one."""
    try:
        return str(json.loads(error.read(65536))["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason
