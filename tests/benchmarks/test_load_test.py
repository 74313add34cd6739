"""What the load test makes of a cluster's words; the cluster itself is started by `make load-test`."""

from typing import Any

import pytest

from benchmarks.load_test import is_settled, verdict
from benchmarks.served import ROOT, addresses_in
from cluster.autoscaling import Decision, RoleScaling
from cluster.config import ClusterConfig
from workers.wire import Role

CONFIG = ClusterConfig.load(ROOT / "manifests" / "autoscaling.yaml")
UP, DOWN = Decision("decode", 1.0, 1, 2, "pages", "full"), Decision("decode", 2.0, 2, 1, "settled", "fits")


def scaling(role: Role, engines: int, wanted: int) -> RoleScaling:
    return RoleScaling(role, engines, wanted, 0.0, "", (), 1.0, None, (), ())


@pytest.mark.parametrize(
    ("engines", "wanted", "settled"), [(1, 1, True), (2, 1, False), (1, 2, False), (2, 2, False)]
)
def test_it_waits_until_every_role_is_back(engines: int, wanted: int, settled: bool) -> None:
    assert is_settled([scaling("prefill", 1, 1), scaling("decode", engines, wanted)], CONFIG) == settled


@pytest.mark.parametrize(
    ("decisions", "failures", "says", "is_well"),
    [
        ([UP, DOWN], {}, "0 requests failed; engines came and went", True),
        ([UP, DOWN], {"http 503": {"count": 2}, "timeout": {"count": 1}}, "3 requests failed", False),
        ([UP], {}, "did not come and go", False),
        ([], {}, "did not come and go", False),
    ],
)
def test_all_is_well_if_nothing_failed_and_engines_came_and_went(
    decisions: list[Decision], failures: dict[str, Any], says: str, is_well: bool
) -> None:
    told, found = verdict(decisions, {"failures": failures})
    assert says in told
    assert found == is_well


def test_addresses_are_read_off_the_banner() -> None:
    lines = iter(
        [
            "eightfold: ready after 26.9 s\n",
            "  HTTP     http://127.0.0.1:41001/v1      metrics http://127.0.0.1:41001/metrics\n",
            "  gRPC     127.0.0.1:41002   TLS off, API keys off\n",
            "the rest\n",
        ]
    )
    assert addresses_in(lines) == ("http://127.0.0.1:41001", "grpc://127.0.0.1:41002")
    assert list(lines) == ["the rest\n"]
    assert addresses_in(["it did not come up\n"]) is None
