"""`eightfold doctor`: whether a description can be served on this machine, and what to do where not."""

import json
from argparse import Namespace
from dataclasses import asdict

from cluster.cli import EXIT_FAILED
from cluster.doctor.finding import Finding, as_text
from cluster.doctor.packages import check_kernels, probe_kernels


def run(options: Namespace) -> int:
    """Look, and print a line for each finding; returns 1 if there is a problem."""
    findings = [check_kernels(*probe_kernels())]
    if findings[0].level != "problem":  # else nothing of ours that needs our kernels can be imported
        findings += _examine(options)
    print(
        json.dumps([asdict(finding) for finding in findings], indent=1) if options.json else as_text(findings)
    )
    return EXIT_FAILED if any(finding.level == "problem" for finding in findings) else 0


def _examine(options: Namespace) -> list[Finding]:
    from cluster.commands.serve import EMBEDDED
    from cluster.config import ClusterConfig
    from cluster.doctor.examine import examine

    return list(examine(ClusterConfig.load(options.config or EMBEDDED)))
