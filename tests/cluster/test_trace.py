"""What a trace says, against the oracle, the engine and counts made another way."""

import json
from itertools import accumulate
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.trace.collect import TraceOptions, judge, trace
from cluster.trace.recorder import WatchedModel
from model.errors import RequestError
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.checkpoints import DEMO, facts, write_checkpoint
from tests.running import demo, run
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.sequence import Request

PROMPTS = {"chat": 0, "lookup_300": 1, "lookup_1000": 2}  # with so many drafts
NUM_OUTPUTS = 32


@pytest.fixture(scope="module")
def model() -> WatchedModel:
    return WatchedModel.load(DEMO, ModelOptions())


@pytest.fixture(scope="module")
def plain() -> LocalModel:
    """The same model as every other command loads it."""
    return LocalModel(DEMO, ModelOptions())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


@pytest.fixture(scope="module")
def oracle() -> dict[str, Tensor]:
    return load_file(DEMO / "oracle.safetensors")


def request(oracle: dict[str, Tensor], name: str) -> Request:
    params = SamplingParams(max_tokens=NUM_OUTPUTS, temperature=0, ignore_eos=True)
    return Request("r", tuple(oracle[f"{name}.input_ids"].tolist()), params)


@pytest.fixture(scope="module")
def reports(
    model: WatchedModel, tokenizer: Tokenizer, oracle: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """As a reader of the JSON sees them, the prompts run in chunks of 400."""
    return {
        name: json.loads(
            trace(
                model, tokenizer, request(oracle, name), EngineConfig(chunk=400, num_drafts=drafts)
            ).to_json()
        )
        for name, drafts in PROMPTS.items()
    }


def drain(engine: Engine) -> list[int]:
    """The answer of the one request that an engine has."""
    tokens = []
    while not engine.is_idle:
        tokens.extend(token.token_id for token in engine.step())
    return tokens


def positions(row: dict[str, Any], layer: int) -> list[int]:
    gaps = row["selected"][layer]
    return list(range(row["position"] + 1)) if gaps is None else list(accumulate(gaps))


def row_at(report: dict[str, Any], position: int) -> dict[str, Any]:
    return next(row for row in report["rows"] if row["position"] == position)


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_are_the_oracles(
    reports: dict[str, dict[str, Any]], oracle: dict[str, Tensor], tokenizer: Tokenizer, name: str
) -> None:
    report = reports[name]
    prompt, output = oracle[f"{name}.input_ids"].tolist(), oracle[f"{name}.output_ids"].tolist()
    assert (report["format"], report["version"]) == ("eightfold-trace", 1)
    assert report["tokens"]["ids"] == prompt + output
    assert "".join(report["tokens"]["texts"]) == tokenizer.decode(prompt + output, skip_special=False)
    assert [entry["position"] for entry in report["outputs"]] == [len(prompt) + n for n in range(NUM_OUTPUTS)]
    for entry, token_id in zip(report["outputs"], output, strict=True):
        assert entry["top"][0] == {
            "id": token_id,
            "text": report["tokens"]["texts"][entry["position"]],
            "logprob": entry["logprob"],
        }
    assert report["request"]["finish_reason"] == "length"


@pytest.mark.parametrize("name", PROMPTS)
def test_selection_at_the_last_prompt_position_is_the_oracles(
    reports: dict[str, dict[str, Any]], oracle: dict[str, Tensor], name: str
) -> None:
    report = reports[name]
    row = row_at(report, report["request"]["prompt_tokens"] - 1)
    num_layers = 7 if PROMPTS[name] else 6  # the MTP layer runs where drafts are made
    assert len(row["selected"]) == num_layers
    for layer, expected in enumerate(oracle[f"{name}.selected_last_prompt_pos"][:num_layers]):
        assert positions(row, layer) == sorted(set(expected.tolist()) - {-1}), f"layer {layer}"


@pytest.mark.parametrize("name", ["lookup_300", "lookup_1000"])
def test_rows_and_counts_are_those_of_one_plain_pass(
    reports: dict[str, dict[str, Any]], oracle: dict[str, Tensor], name: str
) -> None:
    """The whole text run once, without engine, pages of several steps, drafts or recorder."""
    report = reports[name]
    ids = report["tokens"]["ids"][:-1]
    num_prompt = report["request"]["prompt_tokens"]
    one_pass = run(demo(), ids)
    same = total = 0
    for row in report["rows"]:
        position = row["position"]
        assert row["experts"][:5] == one_pass.routed[:, position].tolist()
        for layer in range(6):
            expected = [key for key in one_pass.selected[layer, position].tolist() if key >= 0]
            same += len(set(positions(row, layer)) & set(expected))
            total += len(expected)
            assert (row["selected"][layer] is None) == (position < 256)
        for experts, weights, nodes in zip(row["experts"], row["weights"], row["nodes"], strict=True):
            assert sum(weights) == pytest.approx(2.5, abs=1e-3)  # routed_scaling_factor
            assert nodes == sorted({expert // 4 for expert in experts})
            assert len(nodes) <= 4
    assert same / total > 0.9999  # near ties may fall otherwise in another batch
    for layer in range(5):
        for key, rows in (("prompt_load", slice(num_prompt)), ("answer_load", slice(num_prompt, None))):
            counts = torch.bincount(one_pass.routed[layer, rows].flatten(), minlength=32)
            assert report["routing"][key][layer] == counts.tolist()


def test_rows_are_the_answers_and_the_end_of_the_prompt(reports: dict[str, dict[str, Any]]) -> None:
    report = reports["lookup_1000"]
    last_row = len(report["tokens"]["ids"]) - 2
    assert [row["position"] for row in report["rows"]] == list(range(last_row - 255, last_row + 1))
    limits = report["limits"]
    assert limits["rows_run"] == last_row + 1
    assert limits["rows_kept"] == 256
    counted = sum(len(layer) for row in report["rows"] for layer in row["selected"] if layer is not None)
    assert limits["positions_kept"] == counted
    assert "256 of" in limits["notes"][0]


def test_coverage_counts_what_rows_chose(reports: dict[str, dict[str, Any]]) -> None:
    """Every row that chooses selects 256 keys; buckets hold shares of the pairs of row and key."""
    report = reports["lookup_1000"]
    num_prompt, bucket = report["request"]["prompt_tokens"], report["coverage"]["bucket"]
    for layer in range(6):
        selected = 0.0
        for number, share in enumerate(report["coverage"]["prompt"][layer]):
            keys = range(number * bucket, (number + 1) * bucket)
            pairs = sum(max(0, num_prompt - max(key, 256)) for key in keys)
            selected += pairs * (share or 0)
        assert selected == pytest.approx(256 * (num_prompt - 256), rel=1e-3)
    answer_rows = [row for row in report["rows"] if row["position"] >= num_prompt]
    hits = sum(0 <= key < bucket for row in answer_rows for key in positions(row, 2))
    share = report["coverage"]["answer"][2][0]
    assert share == pytest.approx(hits / (bucket * len(answer_rows)), abs=1e-4)


@pytest.mark.parametrize("name", PROMPTS)
def test_drafts_are_the_engines(
    reports: dict[str, dict[str, Any]], oracle: dict[str, Tensor], plain: LocalModel, name: str
) -> None:
    report = reports[name]
    engine = plain.engine(EngineConfig(chunk=400, num_drafts=PROMPTS[name]), 1100)
    engine.add(request(oracle, name))
    drain(engine)
    verdicts = [draft["verdict"] for step in report["steps"] for draft in step["drafts"]]
    assert verdicts.count("accepted") == sum(engine.acceptance.accepted)
    assert len(verdicts) - verdicts.count("unjudged") == sum(engine.acceptance.drafted)
    assert sum(entry["drafted"] for entry in report["outputs"]) == verdicts.count("accepted")
    assert report["routing"]["rejected_rows"] == len(verdicts) - verdicts.count("accepted")
    drawn = [token_id for step in report["steps"] for token_id in step["drawn"]]
    assert drawn == oracle[f"{name}.output_ids"].tolist()
    for step in report["steps"]:
        accepted = [draft["id"] for draft in step["drafts"] if draft["verdict"] == "accepted"]
        assert step["drawn"][: len(accepted)] == accepted


def test_the_first_draft_of_each_step_is_the_oracles(
    reports: dict[str, dict[str, Any]], oracle: dict[str, Tensor]
) -> None:
    report = reports["lookup_1000"]
    guesses = oracle["lookup_1000.mtp_draft_ids"].tolist()
    decoding = [step for step in report["steps"] if step["drafts"]]
    assert len(decoding) > 5
    for step in decoding:
        assert step["drafts"][0]["id"] == guesses[step["start"] - report["request"]["prompt_tokens"]]


@pytest.mark.parametrize(
    ("drafts", "drawn", "verdicts"),
    [
        ([], [5], []),
        ([5, 6], [5, 6, 7], ["accepted", "accepted"]),
        ([5, 6, 7], [5, 9], ["accepted", "rejected", "unjudged"]),
        ([5, 6], [9], ["rejected", "unjudged"]),
        ([1, 6], [1], ["accepted", "unjudged"]),  # the answer ended with the first
    ],
)
def test_verdicts(drafts: list[int], drawn: list[int], verdicts: list[str]) -> None:
    assert judge(drafts, drawn) == verdicts


def test_copies_are_means_of_the_counts(reports: dict[str, dict[str, Any]]) -> None:
    routing = reports["lookup_300"]["routing"]
    rows = sum(map(sum, routing["nodes_per_token"]))
    sent = sum(n * count for layer in routing["nodes_per_token"] for n, count in enumerate(layer))
    assert routing["copies"]["sent"] == pytest.approx(sent / rows, abs=1e-4)
    assert all(not any(layer[5:]) for layer in routing["nodes_per_token"])  # topk_group is 4
    assert any(any(layer[5:]) for layer in routing["unrestricted_nodes_per_token"])
    assert routing["copies"]["sent"] <= 4 < routing["copies"]["unrestricted"] < 8
    assert routing["copies"]["bytes_each"] == 256 * 4 + 8 * 6
    assert routing["nodes"][3] == {"name": "node-3", "groups": [3, 4], "experts": [12, 16]}


def test_the_gates_asked_again_choose_what_the_model_chose(
    model: WatchedModel, oracle: dict[str, Tensor]
) -> None:
    """With the limit on groups; so what they say without it is said of the right scores."""
    seen = []
    gates = model.recorder._gates
    without_limit = gates.experts

    def both(layer: int, x: Tensor) -> Tensor:
        seen.append(gates.__class__.experts(gates, layer, x, num_groups=8, topk_group=4))
        return without_limit(layer, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "experts", both)
        run(model.decoder(), oracle["lookup_300.input_ids"].tolist())
    passes = model.recorder.take()
    routed = [layer.experts for one in passes for layer in one.routed]
    assert len(seen) == 5
    assert all(torch.equal(again, chosen) for again, chosen in zip(seen, routed, strict=True))


def test_fewer_nodes_need_fewer_copies(
    model: WatchedModel, tokenizer: Tokenizer, oracle: dict[str, Tensor]
) -> None:
    report = trace(model, tokenizer, request(oracle, "chat"), EngineConfig(), TraceOptions(nodes=3))
    assert [node.groups for node in report.routing.nodes] == [(0, 3), (3, 6), (6, 8)]
    assert 1 <= report.routing.copies.sent <= 3
    one = trace(model, tokenizer, request(oracle, "chat"), EngineConfig(), TraceOptions(nodes=1))
    assert one.routing.copies.sent == one.routing.copies.unrestricted == 1


@pytest.mark.parametrize("name", PROMPTS)
def test_seconds_add_up(reports: dict[str, dict[str, Any]], name: str) -> None:
    for step in reports[name]["steps"]:
        time = step["seconds"]
        parts = [time[part] for part in ("forward", "head", "sample", "draft", "other")]
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(time["total"], abs=1e-5)
        assert len(time["attention"]) == len(time["feed_forward"]) == 6
        assert min(*time["attention"], *time["feed_forward"]) > 0
        assert sum(time["attention"]) + sum(time["feed_forward"]) <= time["forward"] + 1e-4


def test_a_budget_of_positions_keeps_the_last_row_of_the_prompt_and_the_first_of_the_answer(
    model: WatchedModel, tokenizer: Tokenizer, oracle: dict[str, Tensor]
) -> None:
    options = TraceOptions(max_positions=5 * 7 * 256 + 10)
    report = trace(model, tokenizer, request(oracle, "lookup_300"), EngineConfig(num_drafts=1), options)
    assert [row.position for row in report.rows] == [297, 298, 299, 300, 301]
    assert report.limits.positions_kept <= report.limits.positions_limit == options.max_positions
    assert "5 of 329" in report.limits.notes[0]


def test_a_stop_string_ends_the_trace_as_it_ends_the_answer(
    model: WatchedModel, tokenizer: Tokenizer, oracle: dict[str, Tensor]
) -> None:
    params = SamplingParams(max_tokens=NUM_OUTPUTS, temperature=0, stop=("person who",))
    stopped = Request("r", request(oracle, "chat").prompt_ids, params)
    report = trace(model, tokenizer, stopped, EngineConfig(num_drafts=3))
    assert report.request.finish_reason == "stop"
    assert report.request.text == "Noun: a "
    assert report.tokens.texts[-1] == " who"
    # The last token is read only if it was a draft; rows behind it do not count.
    assert report.limits.rows_run == len(report.tokens.ids) - (not report.outputs[-1].drafted)


def test_watching_changes_no_token(
    model: WatchedModel, plain: LocalModel, tokenizer: Tokenizer, oracle: dict[str, Tensor]
) -> None:
    """Sampled and with drafts."""
    params = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=7)
    sampled = Request("r", request(oracle, "lookup_300").prompt_ids, params)
    report = trace(model, tokenizer, sampled, EngineConfig(num_drafts=2))
    engine = plain.engine(EngineConfig(), 400)
    engine.add(sampled)
    assert list(report.tokens.ids[298:]) == drain(engine)


def test_dense_attention_selects_nothing(tokenizer: Tokenizer, oracle: dict[str, Tensor]) -> None:
    dense = WatchedModel.load(DEMO, ModelOptions(attention="dense"))
    report = trace(dense, tokenizer, request(oracle, "lookup_300"), EngineConfig())
    assert all(layer is None for row in report.rows for layer in row.selected)
    assert all(share is None for layer in report.coverage.prompt for share in layer)
    assert "dense" in report.limits.notes[-1]


def test_another_shape(tmp_path: Any, tokenizer: Tokenizer) -> None:
    """Two groups a token, no MTP module, and more ids than the tokenizer has."""
    other = WatchedModel.load(write_checkpoint(tmp_path, facts(vocab_size=9000)), ModelOptions())
    prompt = Request("r", tuple(range(8100, 8200)), SamplingParams(max_tokens=5, temperature=0))
    report = trace(other, tokenizer, prompt, EngineConfig(chunk=16), TraceOptions(nodes=4))
    assert report.model.moe_layers == (1, 2)
    assert not report.model.has_mtp
    assert len(report.steps) >= 7
    assert all(len(nodes) <= 2 for row in report.rows for nodes in row.nodes)
    assert {len(row.selected) for row in report.rows} == {3}
    with pytest.raises(RequestError, match="1 to 4 nodes"):
        trace(other, tokenizer, prompt, EngineConfig(), TraceOptions(nodes=8))
    with pytest.raises(RequestError, match="MTP"):
        trace(other, tokenizer, prompt, EngineConfig(num_drafts=1), TraceOptions(nodes=4))
