"""What the doctor finds. Imports nothing of Eightfold: an environment can be too broken for that."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what was looked at, the same words in every run.
        level: a `problem` keeps the description from being served, a `warning` will hurt later.
        found: what is there, with its unit.
        limit: what has to be there.
        cure: what to do; empty where it is ok.
    """

    check: str
    level: Level
    found: str
    limit: str
    cure: str = ""


def as_text(findings: list[Finding]) -> str:
    """A line for each."""
    width = max(len(finding.check) for finding in findings)
    return "\n".join(_line(finding, width) for finding in findings)


def _line(finding: Finding, width: int) -> str:
    cure = f"; cure: {finding.cure}" if finding.cure else ""
    return f"{finding.level:<7}  {finding.check:<{width}}  {finding.found} (needs: {finding.limit}){cure}"
