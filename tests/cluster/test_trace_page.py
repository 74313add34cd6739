"""The page: whole in one file, harmless whatever the text says. The command: its files and its refusals."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cluster.cli import EXIT_USER_ERROR, main
from cluster.trace.page import embed
from tests.checkpoints import DEMO, facts, write_checkpoint

ROOT = DEMO.parent.parent
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<script>{{SCRIPT}}{{DATA}}"
    "\u2028\u2029 &lt;b&gt; \"'` ]]> https://example.org/"
)


class Page(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[str] = []
        self._is_raw = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._is_raw = tag in ("script", "style")
        if self._is_raw:
            self.raw.append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_raw = False

    def handle_data(self, data: str) -> None:
        if self._is_raw:
            self.raw[-1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON and page of a prompt that attacks the page, which it also makes the title of its checkpoint."""
    directory = tmp_path_factory.mktemp("trace")
    model = directory / "<img src=x onerror=alert(3)>"
    model.symlink_to(DEMO)
    files = ["--json", str(directory / "t.json"), "--html", str(directory / "t.html")]
    assert main(["trace", HOSTILE, "--model", str(model), "--max-tokens", "4", *files]) == 0
    return directory


def test_the_page_needs_nothing_else(made: Path) -> None:
    page = Page((made / "t.html").read_text())
    names = [tag for tag, _ in page.elements]
    assert names.count("script") == 2
    assert names.count("style") == 1
    assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & set(names)
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
    style, _, script = page.raw
    assert "url(" not in style
    assert "@import" not in style
    for risky in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "import("):
        assert risky not in script


def test_only_the_pages_own_script_may_run(made: Path) -> None:
    page = Page((made / "t.html").read_text())
    policy = next(
        attributes["content"] or ""
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    style, _, script = page.raw
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name, text in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy


def test_hostile_text_is_data_and_nothing_else(made: Path) -> None:
    text = (made / "t.html").read_text()
    page = Page(text)
    data = page.raw[1]
    assert not re.search("[<>&\u2028\u2029]", data)
    report = json.loads(data)
    assert report == json.loads((made / "t.json").read_text())
    assert HOSTILE in "".join(report["tokens"]["texts"])
    assert report["model"]["name"] == "<img src=x onerror=alert(3)>"
    assert text.count("onerror=") == data.count("onerror=")
    assert "{{" not in text.replace(data, "")


def test_embedded_json_says_the_same() -> None:
    value = {"a<": ["</script>", "<!--", "\u2028", "&amp;", "é", "\\", "\\u003c"]}
    assert json.loads(embed(json.dumps(value, ensure_ascii=False))) == value


def test_without_names_both_files_come_under_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("def f(é):".encode())))
    assert main(["trace", "-", "--max-tokens", "2"]) == 0
    report = json.loads(Path("trace.json").read_text())
    assert "".join(report["tokens"]["texts"]).startswith("<｜begin▁of▁sentence｜>def f(é):")
    assert report["request"]["drafts"] == 1
    assert report["routing"]["nodes"][-1]["name"] == "node-7"
    errors = capsys.readouterr().err
    assert "trace.json: " in errors
    assert "trace.html: " in errors
    assert "drafts accepted" in errors


def test_one_name_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ids.json").write_text("[0, 425, 1125]")
    arguments = ["--prompt-ids", "ids.json", "--max-tokens", "2", "--drafts", "0", "--rows", "1"]
    assert main(["trace", *arguments, "--html", "page.html"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"ids.json", "page.html"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x", "--model", "nowhere"], "nowhere"),
        (["--prompt-ids", "nowhere.json"], "nowhere.json"),
        (["x", "--nodes", "9"], "--nodes: is 9; 8 groups go to 1 to 8 nodes"),
        (["x", "--nodes", "0"], "--nodes"),
        (["x", "--rows", "0"], "--rows"),
        (["x", "--max-tokens", "0"], "max_tokens"),
        (["x", "--max-tokens", "1000000000000"], "max_tokens"),
        (["x", "--chunk", "0"], "chunk"),
        (["x", "--json", "nowhere/t.json"], "nowhere is not a directory"),
        (["x", "--html", "."], "--html"),
        (["-"], "byte 2 of the standard input is not UTF-8"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(["trace", *arguments]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not list(tmp_path.iterdir())


def test_drafts_without_an_mtp_module_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path, facts())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((DEMO / name).read_bytes())
    (model / "ids.json").write_text("[0, 5]")
    arguments = ["--model", str(model), "--prompt-ids", str(model / "ids.json"), "--nodes", "4"]
    files = ["--json", str(tmp_path / "t.json")]
    assert main(["trace", *arguments, *files]) == EXIT_USER_ERROR
    assert "no MTP module: use 0" in capsys.readouterr().err
    assert main(["trace", *arguments, *files, "--drafts", "0", "--max-tokens", "2"]) == 0


@pytest.mark.parametrize("arguments", [["x", "--drafts", "4"], [], ["x", "--prompt-ids", "ids.json"]])
def test_wrong_usage_ends_with_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["trace", *arguments])
    assert error.value.code == EXIT_USER_ERROR
    assert "eightfold trace: error" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom cluster.cli import main\n"
        "try: main(['trace', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'numpy', 'pydantic', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--nodes N" in result.stdout


def test_the_files_of_the_page_are_packed() -> None:
    """The wheel takes whole folders; nothing may leave these out."""
    folder = ROOT / "cluster" / "trace"
    assert {"page.html", "page.css", "page.js"} <= {file.name for file in folder.iterdir()}
    assert all((folder / name).read_text() for name in ("page.html", "page.css", "page.js"))
