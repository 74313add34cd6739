"""The options of `eightfold bench`; needs nothing but the standard library."""

import argparse
from pathlib import Path

_DRAWN = "N, LOW..HIGH (uniform) or lognormal:MEDIAN,SIGMA[,MAX]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them, in groups."""
    parser.add_argument(
        "url",
        nargs="?",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="of an OpenAI-compatible server (http, https), or an Eightfold's gRPC (grpc://host:port, grpcs)",
    )
    _add_target(parser.add_argument_group("whom to ask"))
    _add_load(parser.add_argument_group("when requests arrive"))
    _add_requests(parser.add_argument_group("what they are"))
    _add_figures(parser.add_argument_group("what is measured"))


def _add_target(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--api", choices=["chat", "completions"], default="chat", help="which of the two")
    group.add_argument("--model", metavar="NAME", help="as the server calls it; the first it serves")
    group.add_argument("--key-file", type=Path, metavar="FILE", help="holds the API key, where one is needed")
    group.add_argument(
        "--status-url",
        metavar="URL",
        help="of an Eightfold's HTTP interface, for its own view; URL if it is HTTP",
    )
    group.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="that the load comes from: one reads 15,000 events/s",
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for one answer, the whole of it"
    )
    group.add_argument(
        "--max-open",
        type=int,
        default=10000,
        metavar="N",
        help="open requests; one more is an error, not a wait",
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rate",
        default="1",
        metavar="R",
        help="sessions a second, or a ramp of rates at seconds with straight lines between: 1@0,10@60,1@120",
    )
    group.add_argument(
        "--arrivals",
        choices=["poisson", "constant", "gamma", "burst"],
        default="poisson",
        help="their pattern",
    )
    group.add_argument(
        "--shape", type=float, default=1.0, metavar="K", help="of gamma: 1 is Poisson, less comes in clumps"
    )
    group.add_argument(
        "--burst-size", type=int, default=10, metavar="N", help="of burst: so many at one moment"
    )
    group.add_argument(
        "--duration", type=float, default=60.0, metavar="SECONDS", help="of arrivals; answers may take longer"
    )
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.jsonl",
        help="recorded arrivals and lengths in place of the options above and below (docs/bench.md)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same load")


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt-tokens", default="256", metavar="D", help=f"new tokens of a question: {_DRAWN}"
    )
    group.add_argument("--answer-tokens", default="64", metavar="D", help="tokens of an answer, likewise")
    group.add_argument("--turns", default="1", metavar="D", help="questions of a session, likewise")
    group.add_argument(
        "--think", default="0", metavar="D", help="seconds between an answer and the next question, likewise"
    )
    group.add_argument(
        "--shared-prefix", type=int, default=0, metavar="N", help="tokens that all sessions begin with"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    group.add_argument(
        "--stop-at-eos",
        action="store_true",
        help="let answers end by themselves; needed where a server does not know ignore_eos",
    )


def _add_figures(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--warmup", type=float, default=0.0, metavar="SECONDS", help="requests due before do not count"
    )
    group.add_argument(
        "--ttft-objective", type=float, metavar="SECONDS", help="for goodput: first token within"
    )
    group.add_argument(
        "--tpot-objective", type=float, metavar="SECONDS", help="a token after the first within"
    )
    group.add_argument("--e2e-objective", type=float, metavar="SECONDS", help="the whole answer within")
    group.add_argument(
        "--max-lateness",
        type=float,
        default=0.05,
        metavar="SECONDS",
        help="of the generator itself (99th percentile); if it is later, the figures are void",
    )
    group.add_argument(
        "--find-capacity", action="store_true", help="search the highest rate that meets the objectives"
    )
    group.add_argument(
        "--attainment", type=float, default=0.99, metavar="SHARE", help="of requests that must meet them"
    )
    group.add_argument(
        "--precision", type=float, default=0.1, metavar="SHARE", help="of the rate, to which it is searched"
    )
    group.add_argument("--max-trials", type=int, default=12, metavar="N", help="of a search, at most")
    group.add_argument(
        "--json", type=Path, default=Path("bench.json"), metavar="FILE", help="where the result goes"
    )
    group.add_argument(
        "--html", type=Path, default=Path("bench.html"), metavar="FILE", help="where the page goes"
    )
