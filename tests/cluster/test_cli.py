"""The commands, run as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.cli import EXIT_USER_ERROR, main
from model.tokenizer import Tokenizer
from tests.checkpoints import DEMO, OFFICIAL_671B

ROOT = DEMO.parent.parent
GENERATE = ["generate", "--max-tokens", "1"]
RANDOM = [*GENERATE, "--weights", "random"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", *arguments]


def oracle_prompt(name: str) -> dict:
    prompts = json.loads((DEMO / "oracle.json").read_text())["prompts"]
    return next(prompt for prompt in prompts if prompt["name"] == name)


@pytest.mark.parametrize("name", ["", "chat", "doctor", "generate", "logits", "inspect"])
def test_help_loads_nothing_heavy(name: str) -> None:
    """Help must come at once, so it may not import torch and its like."""
    code = (
        "import sys\nfrom cluster.cli import build_parser\n"
        f"try: build_parser().parse_args({[*name.split(), '--help']})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'tokenizers', 'safetensors', 'ray'} & set(sys.modules)\n"
        "sys.exit(f'help imports {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage: eightfold" in result.stdout


def test_generate_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = oracle_prompt("code")
    code = main(["generate", "--prompt", prompt["prompt"], "--max-tokens", "32", "--drafts", "2", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["output_ids"] == prompt["output_ids"]
    assert report["text"] == prompt["output_text"]
    assert len(report["prompt_ids"]) == prompt["prompt_tokens"]
    assert report["finish_reason"] == "length"
    assert 0 < report["accepted"] <= report["drafted"]
    assert report["prefill_seconds"] > 0
    assert report["decode_seconds"] > 0


def test_generate_reads_ids_and_puts_bos_before_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.json").write_text("[0, 425, 1125]")
    main(["generate", "--prompt-ids", str(tmp_path / "ids.json"), "--max-tokens", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["prompt_ids"] == [0, 425, 1125]
    main(["generate", "--prompt", "def", "--max-tokens", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["prompt_ids"][0] == 0


def test_generate_streams_text_up_to_a_stop_string(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = oracle_prompt("code")
    main(["generate", "--prompt", prompt["prompt"], "--max-tokens", "32", "--stop", "for line"])
    output = capsys.readouterr()
    assert output.out == prompt["output_text"].split("for line")[0]
    assert "tokens in" in output.err


def test_random_weights_need_a_configuration_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    (tmp_path / "ids.json").write_text("[0, 425, 1125]")
    model = ["--model", str(tmp_path), "--weights", "random", "--layers", "2"]
    prompt = ["--prompt-ids", str(tmp_path / "ids.json")]
    assert main(["generate", *model, *prompt, "--max-tokens", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == " ".join(map(str, report["output_ids"]))
    assert main(["generate", *model, *prompt, "--max-tokens", "4", "--drafts", "2"]) == 0
    assert capsys.readouterr().out == report["text"]
    out = tmp_path / "out.safetensors"
    assert main(["logits", *model, *prompt, "--out", str(out), "--selected"]) == 0
    tensors = load_file(out)
    assert tensors["logits"].argmax() == report["output_ids"][0]
    assert tensors["selected"].shape[0] == 2


def test_random_weights_speak_through_a_tokenizer_that_lies_there(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--weights", "random", "--layers", "1", "--prompt", "def", "--max-tokens", "3"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == Tokenizer.load(DEMO).decode(report["output_ids"])


@pytest.mark.parametrize("pages", ["full", "fp8"])
def test_logits_writes_what_the_oracle_says(tmp_path: Path, pages: str) -> None:
    oracle = load_file(DEMO / "oracle.safetensors")
    (tmp_path / "ids.json").write_text(json.dumps(oracle["lookup_300.input_ids"].tolist()))
    out = tmp_path / "out.safetensors"
    arguments = ["logits", "--prompt-ids", str(tmp_path / "ids.json"), "--out", str(out)]
    assert main([*arguments, "--positions", "all", "--chunk", "100", "--selected", "--pages", pages]) == 0
    tensors = load_file(out)
    assert tensors["logits"].shape == (298, 8192)
    assert tensors["logits"].dtype == torch.float32
    difference = (tensors["logits"][-1] - oracle["lookup_300.last_prompt_logits"]).abs().max()
    assert difference < (1e-3 if pages == "full" else 1.0)
    assert tensors["selected"].shape == (6, 298, 256)
    assert tensors["selected"].dtype == torch.int32
    if pages == "full":
        expected = oracle["lookup_300.selected_last_prompt_pos"][:6]
        assert torch.equal(tensors["selected"][:, -1].sort().values, expected.sort().values)
    assert main([*arguments]) == 0
    assert load_file(out)["logits"].shape == (1, 8192)


def test_inspect_checks_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", str(DEMO)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] + report["parameters_mtp"] == 26_916_160
    assert report["checked"] == "1362 tensors in 3 files"
    assert report["chat_encoding"] == "exp"
    assert len(report["weights_digest"]) == 64


def test_inspect_knows_the_official_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", str(OFFICIAL_671B)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 671_877_944_064
    assert report["parameters_mtp"] == 11_624_027_648
    assert report["cache_bytes_per_token"]["fp8"] == 48_856
    assert "configuration only" in report["checked"]
    assert main(["inspect", str(OFFICIAL_671B)]) == 0
    assert "671,877,944,064" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--prompt", "x", "--max-tokens", "9000"], "max_tokens"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "max_tokens"),
        (["generate", "--prompt", "x", "--max-tokens", "1", "--temperature", "nan"], "temperature"),
        (["generate", "--prompt", "x", "--max-tokens", "1", "--chunk", "0"], "chunk"),
        (["generate", "--prompt", "x", "--max-tokens", "1", "--model", "nowhere"], "nowhere"),
        (["generate", "--prompt-ids", "nowhere.json", "--max-tokens", "1"], "nowhere.json"),
        (["logits", "--prompt-ids", "nowhere.json", "--out", "x"], "nowhere.json"),
        (
            [*RANDOM, "--layers", "7", "--prompt", "x"],
            "layers: expected 1 to 6, its num_hidden_layers, found 7",
        ),
        (
            [*RANDOM, "--layers", "0", "--prompt", "x"],
            "layers: expected 1 to 6, its num_hidden_layers, found 0",
        ),
        ([*GENERATE, "--layers", "2", "--prompt", "x"], "--layers: goes with --weights random only"),
        ([*RANDOM, "--model", str(OFFICIAL_671B), "--prompt", "x"], "--prompt: needs a tokenizer.json"),
        (["inspect", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "content", ["{", '{"a": 1}', '["a"]', "[1.5]", "[true]", "[8192]", "[]", "[" * 100_000]
)
def test_bad_prompt_files_are_refused(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.json").write_text(content)
    arguments = ["--prompt-ids", str(tmp_path / "ids.json")]
    assert main(["generate", *arguments, "--max-tokens", "1"]) == EXIT_USER_ERROR
    assert main(["logits", *arguments, "--out", str(tmp_path / "out")]) == EXIT_USER_ERROR
    assert "prompt" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "gpu.yaml"
    config.write_text("model: {kernels: triton, device: cuda, dtype: bfloat16, pages: fp8}\n")
    assert main(["serve", str(config)]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(
        "eightfold serve: model.device: is cuda; no GPU can be used here"
    )


def test_chat_answers_and_keeps_the_conversation() -> None:
    lines = 'What does "harbor" mean?\n/stats\nName a synonym.\n/nothing\n/new\n/think\n/exit\n'
    result = subprocess.run(
        command("chat", "--drafts", "1"),
        input=lines,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Noun: a person who is harbor of a woman." in result.stdout
    assert "prompt 13 tokens" in result.stdout
    assert "drafts accepted" in result.stdout
    assert "there is no /nothing" in result.stdout
    assert "reasoning is on" in result.stdout
    assert "<｜" not in result.stdout


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        # Hot and long enough that the answer surely runs when the signal comes.
        command("chat", "--max-tokens", "8000", "--temperature", "2", "--seed", "5"),
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        process.stdin.write("Hello\n")
        process.stdin.flush()
        while "Ctrl-C stops" not in process.stdout.readline():
            pass
        assert process.stdout.read(1)  # the first characters of the answer
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        output, _ = process.communicate("/stats\n/exit\n", timeout=120)
    assert process.returncode == 0
    assert "stopped by Ctrl-C" in output
