"""The rendered examples are what is rendered now, and the image follows the rules."""

import re
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.render.manifests import render
from cluster.render.pods import USER_ID
from cluster.render.rayservice import RAY_VERSION

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "manifests/kubernetes").glob("*.yaml"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PINS = (ROOT / "requirements-dev.txt").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_what_is_rendered(path: Path) -> None:
    written = {file.name: file.read_text() for file in path.with_suffix("").iterdir()}
    assert written == render(ClusterConfig.load(path)), "run `make manifests`"


def test_there_are_no_other_examples() -> None:
    folders = {path.name for path in (ROOT / "manifests/kubernetes").iterdir() if path.is_dir()}
    assert folders == {path.stem for path in EXAMPLES} == {"cpu-demo", "h100-8x8", "h200-8x8", "openshift"}


def test_the_image_has_the_ray_that_is_announced() -> None:
    assert re.search(rf"^ray\[serve\]=={re.escape(RAY_VERSION)}$", PINS, re.MULTILINE)


def breaches(dockerfile: str) -> list[str]:
    """What is wrong with a Dockerfile, by stage."""
    found: list[str] = []
    text = dockerfile.replace("\\\n", " ")
    stages = {match[2]: match[1] for match in re.finditer(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)}
    for name, image in stages.items():
        if image not in stages and not re.search(r":\d+\.\d+\.\d+-", image):
            found.append(f"{name}: {image} is not pinned")
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        name = stage.split()[2]
        users = re.findall(r"^USER (\S+)$", stage, re.MULTILINE)
        if name in ("cpu", "cuda") and (not users or users[-1] != f"{USER_ID}:{USER_ID}"):
            found.append(f"{name}: runs as {users[-1:] or 'root'}")
        if name in ("cpu", "cuda") and "pip install" in stage:
            found.append(f"{name}: installs")
        for command in re.findall(r"pip install ([^&\n]*)", stage):
            for word in re.sub(r"(-r|--index-url|--target) +\S+", "", command).split():
                if not word.startswith("-") and word != "." and "==" not in word:
                    found.append(f"{name}: {word} is not pinned")
        found += [f"{name}: {word}" for word in ("ADD ", "curl", "apt-get", "latest") if word in stage]
    if not {"cpu", "cuda"} <= stages.keys():
        found.append("cpu and cuda are the targets")
    return found


def test_the_dockerfile_follows_the_rules() -> None:
    assert breaches(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("USER 10001:10001", "USER 0"),
        ("USER 10001:10001", ""),
        ("python:3.12.12-slim-bookworm", "python:3.12-slim"),
        ("python:3.12.12-slim-bookworm", "python:latest"),
        ("torch==2.13.0", "torch"),
        ("hatchling==1.33.0", "hatchling"),
        ("WORKDIR /home/eightfold", "RUN pip install ipython==9.0"),
        ("COPY --from=package", "ADD --from=package"),
    ],
)
def test_rules_of_the_dockerfile_see_their_breach(old: str, new: str) -> None:
    assert old in DOCKERFILE
    assert breaches(DOCKERFILE.replace(old, new)) != []


def test_versions_are_those_that_are_tested() -> None:
    for name, version in re.findall(r"([\w-]+)==([\w.]+)", DOCKERFILE):
        pinned = re.search(rf"^{name}==(\S+)", PINS, re.MULTILINE | re.IGNORECASE)
        if pinned and (name, version) != ("torch", "2.11.0"):  # the one of the GPU tests
            assert version == pinned[1], name


def test_the_builder_sees_nothing_it_does_not_need() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == {
        "pyproject.toml", "requirements-dev.txt", "README.md", "LICENSE",
        "kernels", "model", "workers", "cluster",
    }  # fmt: skip
