"""What the doctor makes of values that a machine could have."""

import tomllib
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.doctor import checks, packages
from cluster.doctor.checks import GIB, Demand, Gpu
from cluster.doctor.examine import demands
from model.config import ModelConfig
from model.errors import CheckpointError
from tests.checkpoints import DEMO, OFFICIAL_671B

ROOT = Path(__file__).parents[3]
H100 = Gpu("H100", (9, 0), 80 * GIB)
ACTOR = Demand("decode actor", 2, 3 * GIB, GIB, 0)


@pytest.mark.parametrize(
    ("installed", "level"),
    [("2.60.0", "ok"), ("2.75.1", "ok"), ("2.59.9", "problem"), ("3.0.0", "problem"), (None, "problem")],
)
def test_ray_has_a_range(installed: str | None, level: str) -> None:
    finding = packages.check_ray(installed)
    assert finding.level == level
    assert bool(finding.cure) == (level != "ok")


def test_the_range_is_that_of_the_package() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    low, high = packages.RAY_AT_LEAST, packages.RAY_BELOW
    assert f"ray[serve]>={low[0]}.{low[1]},<{high[0]}" in wanted


def test_the_name_kernels_must_be_ours() -> None:
    assert packages.check_kernels(None, None).level == "ok"
    theirs = packages.check_kernels("0.17.2", "/site/kernels/__init__.py")
    assert theirs.level == "problem"
    assert "pip uninstall -y kernels" in theirs.cure
    unknown = packages.check_kernels(None, "/elsewhere/kernels/__init__.py")
    assert unknown.level == "problem"
    assert "/elsewhere" in unknown.found


def test_a_port_is_free_or_has_a_cure() -> None:
    assert checks.check_port("http_port", "127.0.0.1", 8000, None).level == "ok"
    assert "any free port" in checks.check_port("http_port", "127.0.0.1", 0, None).found
    taken = checks.check_port("http_port", "127.0.0.1", 8000, "Address already in use")
    assert taken.level == "problem"
    assert "gateway.http_port" in taken.cure


@pytest.mark.parametrize(("available", "level"), [(11, "ok"), (9, "warning"), (7, "problem")])
def test_memory_counts_every_process(available: int, level: str) -> None:
    finding = checks.check_memory([ACTOR], available * GIB)
    assert finding.level == level
    assert "about 8.0 GiB: 2 x 4.0 GiB decode actor" in finding.limit


@pytest.mark.parametrize(
    ("free", "total", "level"), [(50, 100, "ok"), (4, 100, "warning"), (0, 100, "problem"), (1, 4, "ok")]
)
def test_disk(free: int, total: int, level: str) -> None:
    assert checks.check_disk(Path("/tmp"), free * GIB, total * GIB).level == level


def test_sockets_of_ray_have_short_names() -> None:
    assert checks.check_temporary_folder(Path("/tmp")).level == "ok"
    assert checks.check_temporary_folder(Path("/" + "long/" * 10)).level == "problem"


@pytest.mark.parametrize(
    ("wanted", "gpus", "is_local", "level"),
    [
        (0, [], True, "ok"),
        (2, [H100, H100], True, "ok"),
        (3, [H100, H100], True, "problem"),
        (64, [], False, "ok"),
        (1, [Gpu("A100", (8, 0), 80 * GIB)], True, "problem"),
        (1, [Gpu("small", (9, 0), 3 * GIB)], False, "problem"),
    ],
)
def test_gpus(wanted: float, gpus: list[Gpu], is_local: bool, level: str) -> None:
    assert checks.check_gpus(wanted, gpus, [ACTOR], is_local).level == level


def test_actors_that_share_a_gpu_share_its_memory() -> None:
    half = Demand("decode actor", 2, 41 * GIB, 0, 0, gpus=0.5)
    assert checks.check_gpus(1, [H100], [half], True).level == "problem"


def test_a_checkpoint_names_what_is_wrong() -> None:
    error = CheckpointError("config.json", "vocab_size", "a number", "null")
    finding = checks.check_checkpoint(Path("/models/v3"), "", error)
    assert finding.level == "problem"
    assert "vocab_size" in finding.found
    assert "eightfold inspect /models/v3" in finding.cure


@pytest.mark.parametrize(
    ("now", "synchronised", "level"),
    [(200, True, "ok"), (200, None, "ok"), (200, False, "warning"), (50, True, "problem")],
)
def test_clock(now: float, synchronised: bool | None, level: str) -> None:
    assert checks.check_clock(now, 100, synchronised).level == level


@pytest.mark.parametrize(("days", "level"), [(90, "ok"), (13, "warning"), (-1, "problem")])
def test_a_certificate_has_time_left(days: int, level: str) -> None:
    finding = checks.check_certificate(1e9 + days * 86400, 1e9)
    assert finding.level == level
    assert bool(finding.cure) == (level != "ok")


def test_days_of_warning_are_those_of_the_alert() -> None:
    alerts = (ROOT / "manifests" / "monitoring" / "alerts.yaml").read_text()
    assert f"- time() < {checks.EXPIRY_DAYS} * {checks.DAY_SECONDS}" in alerts


@pytest.mark.parametrize(
    ("names", "host", "level"),
    [
        (("a.example", "10.0.0.1"), "10.0.0.1", "ok"),
        (("a.example",), "127.0.0.1", "warning"),
        (("a.example",), "0.0.0.0", "ok"),
        ((), "::", "warning"),
    ],
)
def test_a_certificate_names_who_is_asked(names: tuple[str, ...], host: str, level: str) -> None:
    assert checks.check_names(names, host).level == level


@pytest.mark.parametrize(
    ("mode", "level"), [(0o600, "ok"), (0o440, "ok"), (0o644, "warning"), (0o660, "warning")]
)
def test_a_key_is_not_for_others(mode: int, level: str) -> None:
    assert checks.check_key_mode("tls.key", mode).level == level


def test_a_ray_that_nobody_started() -> None:
    assert checks.check_ray_address("10.0.0.1:6379", None).level == "ok"
    assert "ray start" in checks.check_ray_address("10.0.0.1:6379", "Connection refused").cure


@pytest.mark.parametrize(
    ("is_installed", "error", "level"),
    [(True, None, "ok"), (True, "Connection refused", "warning"), (False, None, "problem")],
)
def test_a_collector(is_installed: bool, error: str | None, level: str) -> None:
    finding = checks.check_collector("http://collector:4318", is_installed, error)
    assert finding.level == level
    assert bool(finding.cure) == (level != "ok")


def test_weights_of_all_processes_are_those_of_the_model() -> None:
    model = ModelConfig.load(DEMO)
    alone = demands(ClusterConfig.model_validate({"engine": {"tokens": 6400}}), model)
    assert [demand.who for demand in alone] == ["engine"]
    pool = ClusterConfig.model_validate({"engine": {"tokens": 6400}, "experts": {"placement": "pool"}})
    engine, expert = demands(pool, model)
    assert expert.processes == 8
    assert engine.weight_bytes + 8 * expert.weight_bytes == alone[0].weight_bytes
    assert engine.page_bytes == alone[0].page_bytes > 0


def test_full_size_is_as_large_as_it_is() -> None:
    """The expert pool of eight nodes cannot be in one GPU of 80 GB each."""
    text = {"directory": str(OFFICIAL_671B), "weights": "random", "device": "cuda", "dtype": "bfloat16"}
    config = ClusterConfig.model_validate({"model": text, "experts": {"placement": "pool"}})
    model = ModelConfig.load(OFFICIAL_671B)
    _, expert = demands(config, model)
    assert checks.check_gpus(9, [H100] * 9, [expert], True).level == "problem"
