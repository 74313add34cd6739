"""`eightfold logits`: a prompt's logits, and what the indexer selected, as tensors in a file."""

import sys
from argparse import Namespace

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.commands.common import load_model, read_prompt_ids
from model.decoder import Trace
from model.errors import PromptTooLong, RequestError
from model.inputs import ForwardInputs
from workers.local import LocalModel


def run(options: Namespace) -> int:
    """Run the prompt in chunks and write `logits`, with `--selected` also `selected`."""
    prompt_ids = read_prompt_ids(options.prompt_ids)
    if options.chunk < 1:
        raise RequestError("--chunk", f"is {options.chunk}; at least 1 token runs at once")
    if not options.out.parent.is_dir():
        raise RequestError("--out", f"{options.out.parent} is not a directory")
    model = load_model(options)
    _check_prompt(prompt_ids, model)
    tensors = prompt_logits(
        model,
        prompt_ids,
        chunk=options.chunk,
        only_last=options.positions == "last",
        with_selected=options.selected,
    )
    save_file(tensors, options.out)
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    print(f"{options.out}: {shapes}", file=sys.stderr)
    return 0


def _check_prompt(prompt_ids: list[int], model: LocalModel) -> None:
    if not prompt_ids:
        raise RequestError("--prompt-ids", "holds no token; at least one is needed")
    vocab_size, limit = model.config.vocab_size, model.config.max_position_embeddings
    for token_id in prompt_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError("--prompt-ids", f"holds {token_id}; ids go from 0 to {vocab_size - 1}")
    if len(prompt_ids) > limit:
        raise PromptTooLong(len(prompt_ids), limit)


@torch.inference_mode()
def prompt_logits(
    model: LocalModel, prompt_ids: list[int], *, chunk: int, only_last: bool, with_selected: bool
) -> dict[str, Tensor]:
    """Run one prompt in chunks.

    Returns:
        `logits` [positions, vocab] float32, and where asked for `selected` [layers, positions, index_topk]
        int32: the key positions that each position attends to, ascending, -1 padded.
    """
    cache = model.cache(len(prompt_ids))
    pages = list(range(cache.num_pages))
    logits, selected = [], []
    for start in range(0, len(prompt_ids), chunk):
        trace = Trace() if with_selected else None
        tokens = prompt_ids[start : start + chunk]
        inputs = ForwardInputs.build([tokens], [start], [pages], model.decoder.device)
        hidden = model.decoder.forward(inputs, cache, trace)
        if only_last and start + chunk < len(prompt_ids):
            continue
        rows = slice(-1, None) if only_last else slice(None)
        logits.append(model.decoder.logits(hidden[rows]))
        if trace:
            selected.append(torch.stack([layer[rows] for layer in trace.selected]))
    tensors = {"logits": torch.cat(logits).cpu()}
    if selected:
        tensors["selected"] = torch.cat(selected, dim=1).cpu()
    return tensors
