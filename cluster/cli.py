"""The command `eightfold`. Only the chosen command's modules are imported, so that help comes at once."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from cluster.bench.options import add_options as add_bench_options
from cluster.demo import DEMO

EXIT_INTERRUPTED = 130  # what shells report for Ctrl-C
EXIT_FAILED = 1  # something went wrong that is not the user's to mend
EXIT_USER_ERROR = 2  # something the user can mend: arguments, a checkpoint, a request

_COMMANDS = {
    "serve": "serve a model over HTTP and gRPC",
    "gateway": "serve a cluster that others started over HTTP and gRPC",
    "render": "write what Kubernetes needs to run a description",
    "doctor": "look for what would keep a description from being served on this machine",
    "status": "say what a running cluster is doing",
    "bench": "put a server under load and measure its answers",
    "chat": "talk to a model in the terminal",
    "generate": "continue one prompt",
    "logits": "write a prompt's logits to a file",
    "trace": "look inside the model while it answers one prompt",
    "inspect": "check a checkpoint and say what the model is",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    from model.errors import EightfoldError

    try:
        code: int = import_module(f"cluster.commands.{options.command}").run(options)
    except EightfoldError as error:
        print(f"eightfold {options.command}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        sys.stderr.close()
        return 1
    return code


def build_parser() -> argparse.ArgumentParser:
    """Every command and option; needs nothing but the standard library."""
    parser = argparse.ArgumentParser(
        prog="eightfold", description="Serve DeepSeek-V3.2-class language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = {
        "serve": _add_serve,
        "gateway": _add_gateway,
        "render": _add_render,
        "doctor": _add_doctor,
        "status": _add_status,
        "bench": add_bench_options,
        "chat": _add_chat,
        "generate": _add_generate,
        "logits": _add_logits,
        "trace": _add_trace,
        "inspect": _add_inspect,
    }
    for name, summary in _COMMANDS.items():
        adders[name](
            commands.add_parser(
                name,
                help=summary,
                description=summary[:1].upper() + summary[1:] + ".",
                formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            )
        )
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        metavar="CONFIG.yaml",
        help="description of the cluster; without one the demo as a cluster on a Ray of this machine, "
        "ports 8000 and 50051",
    )


def _add_gateway(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="description of the cluster")


def _add_render(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="description of the cluster")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the manifests")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        metavar="CONFIG.yaml",
        help="description of the cluster; without one what `serve` runs without one",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of lines")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="of a gateway's HTTP interface"
    )
    parser.add_argument(
        "--key-file", type=Path, metavar="FILE", help="holds the API key, where one is needed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_kernels(parser)
    _add_weights(parser)
    _add_sampling(parser)
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="longest answer, reasoning included"
    )
    parser.add_argument("--thinking", action="store_true", help="let the model reason before it answers")
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_kernels(parser)
    _add_weights(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="raw text, special tokens in it are recognised; BOS is put before it"
    )
    _add_prompt_ids(prompt)
    parser.add_argument(
        "--max-tokens", type=int, required=True, metavar="N", help="tokens to generate at most"
    )
    _add_sampling(parser)
    _add_stopping(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def _add_logits(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_kernels(parser)
    _add_weights(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    _add_prompt_ids(prompt)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--positions", choices=["last", "all"], default="last", help="whose logits to write")
    parser.add_argument(
        "--selected", action="store_true", help="also write what each layer's indexer selected"
    )


def _add_trace(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="raw text, special tokens in it are recognised; BOS is put before it; - reads standard input",
    )
    _add_prompt_ids(prompt)
    _add_model(parser)
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens to generate at most")
    _add_sampling(parser)
    parser.set_defaults(drafts=1)
    _add_stopping(parser)
    parser.add_argument(
        "--nodes", type=int, default=8, metavar="N", help="nodes that the expert groups are dealt out to"
    )
    parser.add_argument(
        "--rows", type=int, default=256, metavar="N", help="tokens shown in full detail, the answer's first"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="page to write; without --json and --html both come, as trace.json and trace.html",
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=DEMO,
        help="a checkpoint, or a directory with only a config.json to see the shape alone",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=DEMO, metavar="DIR", help="checkpoint directory")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the arithmetic; float32, or bfloat16 with --kernels triton",
    )
    parser.add_argument(
        "--pages",
        choices=["fp8", "full"],
        help="format of the caches: full, in full precision, or fp8, as served (and with --kernels triton)",
    )
    parser.add_argument(
        "--attention",
        choices=["sparse", "dense"],
        default="sparse",
        help="over what the indexer selects, or over everything",
    )
    parser.add_argument("--chunk", type=int, default=2048, metavar="N", help="tokens of a prompt run at once")


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernels",
        choices=["reference", "triton"],
        default="reference",
        help="plain torch on this CPU, or kernels for an NVIDIA GPU (docs/kernels.md)",
    )


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=["checkpoint", "random"],
        default="checkpoint",
        help="read from the directory, or drawn at random for its config.json, to measure any shape",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="of random weights: the first N layers only; all without it"
    )


def _add_prompt_ids(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--prompt-ids", type=Path, metavar="FILE.json", help="a JSON list of token ids")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="nucleus to sample from; 1 is all"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same answer")
    parser.add_argument(
        "--drafts",
        type=int,
        choices=range(4),
        default=0,
        help="tokens guessed ahead; changes the speed and not the answer",
    )


def _add_stopping(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may repeat"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")


if __name__ == "__main__":
    sys.exit(main())
