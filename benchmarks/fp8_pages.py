"""What fp8 pages cost in exactness: the demo's next-token distributions with them against full pages.

    python -m benchmarks.fp8_pages [--positions 20000]

Text is the demo's held-out lookup conversations, each run whole and once in either format, everything else
in float32; every position counts.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model.decoder import Decoder
from tests.running import Run, demo, lookup_documents, run, selection_mask

_ROWS = 512  # positions whose logits are compared at once


@dataclass(frozen=True)
class Comparison:
    """Positions under fp8 pages against the same under full pages.

    Attributes:
        divergence: [T] float64, KL(full || fp8) of the next-token distributions, in nats.
        agrees: [T] bool, whether the likeliest token is the same.
        loss_change: [T] float64, by how much the text's own next token became less likely, in nats.
        rerouted: [T] bool, whether some layer sends the position to another expert. A gate whose last choice
            hangs by a thread turns a small difference into a large one; the divergence's tail is these.
        recalled, selected: [L] int64, over the positions that see more than index_topk keys: of the keys
            selected under full pages, how many fp8 pages select too.
    """

    divergence: Tensor
    agrees: Tensor
    loss_change: Tensor
    rerouted: Tensor
    recalled: Tensor
    selected: Tensor

    @classmethod
    def join(cls, parts: Iterable[Self]) -> Self:
        parts = list(parts)
        return cls(
            torch.cat([part.divergence for part in parts]),
            torch.cat([part.agrees for part in parts]),
            torch.cat([part.loss_change for part in parts]),
            torch.cat([part.rerouted for part in parts]),
            torch.stack([part.recalled for part in parts]).sum(0),
            torch.stack([part.selected for part in parts]).sum(0),
        )

    @property
    def recall(self) -> Tensor:
        """[L] float64."""
        return self.recalled.double() / self.selected


def compare(decoder: Decoder, token_ids: list[int]) -> Comparison:
    """Run one text under both formats."""
    full, fp8 = (run(decoder, token_ids, page_format=page_format) for page_format in ("full", "fp8"))
    divergence, agrees, loss_change = [], [], []
    following = torch.tensor([*token_ids[1:], token_ids[0]])
    for start in range(0, len(token_ids), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = (each.logits[rows].double().log_softmax(-1) for each in (full, fp8))
        divergence.append((p.exp() * (p - q)).sum(-1))
        agrees.append(p.argmax(-1) == q.argmax(-1))
        loss_change.append((p - q).gather(1, following[rows].unsqueeze(1)).squeeze(1))
    rerouted = (full.routed != fp8.routed).any(-1).any(0)
    recalled, selected = _recall(decoder, full, fp8)
    return Comparison(
        torch.cat(divergence), torch.cat(agrees), torch.cat(loss_change)[:-1], rerouted, recalled, selected
    )


def _recall(decoder: Decoder, full: Run, fp8: Run) -> tuple[Tensor, Tensor]:
    choosing = slice(decoder.config.index_topk, None)
    num_tokens = full.selected.shape[1]
    recalled, selected = [], []
    for of_full, of_fp8 in zip(full.selected, fp8.selected, strict=True):
        wanted, found = (selection_mask(each[choosing], num_tokens) for each in (of_full, of_fp8))
        recalled.append((wanted & found).sum())
        selected.append(wanted.sum())
    return torch.stack(recalled), torch.stack(selected)


def spread(documents: list[list[int]], num_positions: int) -> list[list[int]]:
    """Documents from all over the list, until they hold so many positions; the last one is cut to fit."""
    golden = 0.6180339887  # its multiples, less their whole parts, fill the unit interval evenly
    chosen: list[list[int]] = []
    missing = num_positions
    while missing > 0 and len(chosen) < len(documents):
        document = documents[int(len(chosen) * golden % 1 * len(documents))]
        chosen.append(document[:missing])
        missing -= len(chosen[-1])
    return chosen


def table(result: Comparison) -> str:
    def row(name: str, value: float, digits: str = ".3g") -> str:
        return f"{name:<34}{value:>12{digits}}"

    divergence = result.divergence
    lines = [
        row("positions", len(divergence), "d"),
        row("KL(full || fp8), mean, nats", float(divergence.mean())),
        row("  median", float(divergence.median())),
        row("  99th percentile", float(divergence.quantile(0.99))),
        row("  largest", float(divergence.max())),
        row("  mean where experts are the same", float(divergence[~result.rerouted].mean())),
        row("other experts in some layer", float(result.rerouted.double().mean())),
        row("same likeliest token", float(result.agrees.double().mean())),
        row("loss, change, nats", float(result.loss_change.mean())),
    ]
    lines += [row(f"index recall, layer {n}", value) for n, value in enumerate(result.recall.tolist())]
    return "\n".join([*lines, row("index recall, all layers", float(result.recall.mean()))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--positions", type=int, default=20_000)
    documents = spread(lookup_documents(), parser.parse_args().positions)
    print(table(Comparison.join(compare(demo(), document) for document in documents)))


if __name__ == "__main__":
    main()
