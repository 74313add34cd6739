"""The runbook's commands exist with the options it gives them, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cluster.cli import build_parser
from cluster.config import ClusterConfig
from tests.cluster.gateway.documented import documented

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXT = (DOCS / "runbook.md").read_text()
ALERTS = ROOT / "manifests" / "monitoring" / "alerts.yaml"

_FENCED = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(eightfold [a-z][^`]*)`")
_KEY = re.compile(r"`((?:prefill|decode|engine|experts|router|gateway|carriers)\.[\w.]+)`")


def commands() -> list[str]:
    """Of `eightfold`, in blocks and in sentences."""
    fenced = [line for block in _FENCED.findall(TEXT) for line in block.splitlines()]
    found = [line.split(" #")[0].strip() for line in fenced if line.startswith("eightfold ")]
    # In sentences a command may be named without its arguments.
    return found + [command for command in _INLINE.findall(TEXT) if len(command.split()) > 2]


@pytest.mark.parametrize("command", commands())
def test_a_command_exists(command: str) -> None:
    build_parser().parse_args(shlex.split(command)[1:])


def test_there_are_commands_to_look_at() -> None:
    assert {command.split()[1] for command in commands()} >= {
        "status",
        "doctor",
        "inspect",
        "render",
        "bench",
    }


@pytest.mark.parametrize("key", sorted(set(_KEY.findall(TEXT))))
def test_a_key_of_a_description_exists(key: str) -> None:
    section = ClusterConfig.model_validate({"prefill": {}, "decode": {}})
    for part in key.split("."):
        assert part in type(section).model_fields, key
        section = getattr(section, part)


def test_metrics_and_alerts_that_it_names_exist() -> None:
    assert set(re.findall(r"\beightfold_\w+", TEXT)) <= documented().keys()
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    named = set(re.findall(r"\bEightfold[A-Z]\w+", TEXT))
    assert named <= alerts
    assert alerts - named == {"EightfoldExpertImbalance"}  # nothing can be done about it yet


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]*)(?:#[\w-]+)?\)", TEXT):
        assert not target or (DOCS / target).exists(), target
