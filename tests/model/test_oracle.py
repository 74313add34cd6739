"""The demo checkpoint against the oracle that came with it (see its MODEL_CARD.md).

Six prompts of 13 to 6,049 tokens are prefilled one by one, in full pages and with the MTP module beside, and
then decoded together. Tokens and logits of the oracle are transformers', drafts and selections those of the
code that trained the checkpoint.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.decoder import Trace
from model.inputs import ForwardInputs
from tests.checkpoints import DEMO
from tests.running import demo, new_cache, num_pages_for

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["chat", "code", "lookup_300", "lookup_1000", "lookup_3000", "lookup_6000"]
NUM_OUTPUTS = 32
CHUNK = 2048  # tokens a pass of a prompt: the longest two come in pieces
MAX_DIFFERENCE = 1e-3  # logits go up to 30; measured 3e-5
# At position 900 of lookup_1000, layer 1, two keys score the same to float32, and we take the one that
# transformers leaves: later logits differ by up to 8e-4. With our choice forced on it, by 3e-5.
MAX_STEP_DIFFERENCE = 5e-3


@dataclass(frozen=True)
class Answer:
    """What the decoder makes of one prompt.

    Attributes:
        output_ids, draft_ids: [32]; draft k was made for the token after output k.
        logits, draft_logits: [32, vocab]; rows that chose outputs and drafts.
        selected: [7, 256] int32, of the last prompt position in every layer, the MTP layer's last.
    """

    output_ids: Tensor
    draft_ids: Tensor
    logits: Tensor
    draft_logits: Tensor
    selected: Tensor


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    return load_file(DEMO / "oracle.safetensors")


@pytest.fixture(scope="module")
def answers(oracle: dict[str, Tensor]) -> dict[str, Answer]:
    model = demo()
    prompts = [oracle[f"{name}.input_ids"].tolist() for name in PROMPTS]
    counts = [num_pages_for(len(prompt) + NUM_OUTPUTS) for prompt in prompts]
    cache = new_cache(model, sum(counts))
    pages = [list(range(sum(counts[:n]), sum(counts[: n + 1]))) for n in range(len(counts))]

    rows: list[Tensor] = []
    draft_rows: list[Tensor] = []
    selected: list[Tensor] = []
    for prompt, held in zip(prompts, pages, strict=True):
        for start in range(0, len(prompt), CHUNK):
            tokens = prompt[start : start + CHUNK]
            trace = Trace()
            hidden = model.forward(ForwardInputs.build([tokens], [start], [held]), cache, trace)
            # The MTP row of position i carries token i + 1; after the last one comes the first output.
            following = prompt[start + 1 : start + CHUNK + 1]
            if len(following) < len(tokens):
                following = [*following, int(model.logits(hidden[-1:]).argmax())]
            draft = model.draft(ForwardInputs.build([following], [start], [held]), hidden, cache, trace)
        rows.append(hidden[-1])
        draft_rows.append(draft[-1])
        selected.append(torch.stack([of_layer[-1] for of_layer in trace.selected]))

    logits = [model.logits(torch.stack(rows))]
    draft_logits = [model.logits(torch.stack(draft_rows))]
    for step in range(NUM_OUTPUTS - 1):
        positions = [len(prompt) + step for prompt in prompts]
        tokens = [[token] for token in logits[-1].argmax(-1).tolist()]
        hidden = model.forward(ForwardInputs.build(tokens, positions, pages), cache)
        logits.append(model.logits(hidden))
        outputs = [[token] for token in logits[-1].argmax(-1).tolist()]
        draft = model.draft(ForwardInputs.build(outputs, positions, pages), hidden, cache)
        draft_logits.append(model.logits(draft))

    all_logits, all_draft_logits = torch.stack(logits, dim=1), torch.stack(draft_logits, dim=1)
    return {
        name: Answer(of_one.argmax(-1), of_drafts.argmax(-1), of_one, of_drafts, chosen)
        for name, of_one, of_drafts, chosen in zip(
            PROMPTS, all_logits, all_draft_logits, selected, strict=True
        )
    }


def test_the_oracle_is_this_file() -> None:
    prompts = json.loads((DEMO / "oracle.json").read_text())["prompts"]
    assert [prompt["name"] for prompt in prompts] == PROMPTS


@pytest.mark.parametrize("name", PROMPTS)
def test_continuation(oracle: dict[str, Tensor], answers: dict[str, Answer], name: str) -> None:
    assert answers[name].output_ids.tolist() == oracle[f"{name}.output_ids"].tolist()


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_of_the_last_prompt_position(
    oracle: dict[str, Tensor], answers: dict[str, Answer], name: str
) -> None:
    expected = oracle[f"{name}.last_prompt_logits"]
    torch.testing.assert_close(answers[name].logits[0], expected, rtol=0, atol=MAX_DIFFERENCE)


@pytest.mark.parametrize("name", PROMPTS)
def test_best_logits_of_every_step(oracle: dict[str, Tensor], answers: dict[str, Answer], name: str) -> None:
    logits, ids = answers[name].logits, oracle[f"{name}.top50_ids"].long()
    expected = oracle[f"{name}.top50_logits"]
    torch.testing.assert_close(logits.gather(1, ids), expected, rtol=0, atol=MAX_STEP_DIFFERENCE)
    # And no other token has come among the best.
    torch.testing.assert_close(logits.topk(50).values, expected, rtol=0, atol=MAX_STEP_DIFFERENCE)


@pytest.mark.parametrize("name", PROMPTS)
def test_drafts(oracle: dict[str, Tensor], answers: dict[str, Answer], name: str) -> None:
    answer = answers[name]
    assert answer.draft_ids.tolist() == oracle[f"{name}.mtp_draft_ids"].tolist()
    best = answer.draft_logits.amax(-1)
    torch.testing.assert_close(best, oracle[f"{name}.mtp_draft_logit"], rtol=0, atol=MAX_STEP_DIFFERENCE)


@pytest.mark.parametrize("name", PROMPTS)
def test_selection_at_the_last_prompt_position(
    oracle: dict[str, Tensor], answers: dict[str, Answer], name: str
) -> None:
    expected = oracle[f"{name}.selected_last_prompt_pos"]
    for layer, (ours, theirs) in enumerate(zip(answers[name].selected, expected, strict=True)):
        assert set(ours.tolist()) == set(theirs.tolist()), f"layer {layer}"
