import math
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.select_long
import kernels.select_shared_rows
import kernels.select_slots
import kernels.select_threshold
from kernels.backend import UnsupportedKernel
from kernels.select_slots import (
    PAGE_SIZE,
    Config,
    config_for,
    launch,
    select_slots,
    select_slots_reference,
)
from kernels.topk import topk_reference
from tests.kernels.compiled import Compiled, compile_for_hopper

MODULES: list[ModuleType] = [kernels.select_slots, kernels.select_long, kernels.select_threshold]
INF = math.inf

# Small forms of what the product runs: rows of some hundred scores are long for them.
RESIDENT = Config("resident", 512, 4)
IN_PIECES = Config("resident", 1024, 4, pieces=4)
SAMPLED = Config("sampled", 128, 4, programs=2, sample=32, candidates=64)
SHARED = Config("shared", 64, 4, splits=4, share_warps=4, sample=32, candidates=64)

KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "normal": lambda x, _: x,
    "narrow": lambda x, _: 5 + 0.3 * x,
    "very narrow": lambda x, _: 1 + 1e-6 * x,
    "equal": lambda x, _: torch.full_like(x, 2.5),
    "levels": lambda x, g: torch.randint(0, 100, x.shape, generator=g) / 7,
    "few levels": lambda x, g: torch.randint(-2, 3, x.shape, generator=g).float(),
    "outlier": lambda x, _: x.index_fill(1, torch.tensor([50]), 1e30),
    "denormal": lambda x, _: x * 1e-42,
    "huge": lambda x, _: x * 1e38,
    "many exponents": lambda x, _: x.sign() * (15 * x).exp(),
    "two zeros": lambda x, _: torch.where(x > 1.8, x, 0.0) * (x * 1000).sin().sign(),
    "infinite": lambda x, _: torch.where(x > 1.2, x, -INF).index_fill(1, torch.tensor([3]), INF),
    "nothing": lambda x, _: torch.full_like(x, -INF),
    "sorted": lambda x, _: x.sort(-1).values,
    "nearly all the same": lambda x, _: torch.where(x.abs() > 2.5, x, 1.0),
}


def logits_of(kind: str, num_rows: int, num_scores: int, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_scores, generator=generator)
    return KINDS[kind](x, generator).to(device)


def hidden_by_nan(logits: Tensor, visible: Tensor) -> Tensor:
    behind = torch.arange(logits.shape[1], device=logits.device) >= visible.unsqueeze(1)
    return logits.masked_fill(behind, math.nan)


def test_reference_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0], [5.0, 5.0, 5.0, -INF]])
    selected = select_slots(
        logits, torch.tensor([3, 4]), None, rows_per_sequence=1, k=2, max_visible=4, backend="reference"
    )
    assert selected.tolist() == [[1, 2], [0, 1]]


def test_reference_gives_slots() -> None:
    logits = torch.arange(130.0).repeat(2, 1)
    page_table = torch.tensor([[7, 5, 3]])
    selected = select_slots(
        logits,
        torch.tensor([130, 1]),
        page_table,
        rows_per_sequence=2,
        k=4,
        max_visible=130,
        backend="reference",
    )
    expected = [[5 * 64 + 62, 5 * 64 + 63, 3 * 64, 3 * 64 + 1], [7 * 64, -1, -1, -1]]
    assert selected.tolist() == expected
    assert selected.dtype == torch.int32


def assert_exact(kind: str, config: Config, num_scores: int, visible: list[int], k: int) -> None:
    seen = torch.tensor(visible)
    logits = hidden_by_nan(logits_of(kind, len(visible), num_scores, num_scores), seen)
    generator = torch.Generator().manual_seed(k)
    num_pages = -(-num_scores // PAGE_SIZE)
    page_table = torch.randperm(99, generator=generator)[:num_pages].repeat(-(-len(visible) // 2), 1)
    for table in (page_table, None)[: 2 if kind == "normal" else 1]:
        options: dict[str, Any] = {"rows_per_sequence": 2, "k": k, "max_visible": num_scores}
        selected = launch(logits, seen, table, config=config, **options)
        assert torch.equal(selected, select_slots_reference(logits, seen, table, **options))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # guesses may overflow, and only make worse guesses
@pytest.mark.parametrize("config", [IN_PIECES, SAMPLED], ids=lambda config: f"{config.kind}{config.pieces}")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_exact(kind: str, config: Config, interpreted: Callable[..., None]) -> None:
    interpreted(*MODULES)
    assert_exact(kind, config, 480, [480, 471, 33], 32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["normal", "narrow", "few levels", "infinite", "sorted"])
def test_shared_rows_are_exact(kind: str, interpreted: Callable[..., None]) -> None:
    interpreted(*MODULES)
    assert_exact(kind, SHARED, 480, [479, 70], 32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("config", [RESIDENT, SAMPLED, SHARED], ids=lambda config: config.kind)
def test_lengths_around_the_limits(config: Config, interpreted: Callable[..., None]) -> None:
    """None, one, one less than k, k, one more; as many as there are candidates, and one more."""
    interpreted(*MODULES)
    assert_exact("normal", config, 130, [0, 1, 31, 32, 33, 64, 65], 32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_is_not_padded(interpreted: Callable[..., None]) -> None:
    """Padded rows are read four scores at a time, also behind their end; others not."""
    interpreted(*MODULES)
    wide = logits_of("normal", 2, 512, 0)
    seen = torch.tensor([497, 130])
    for logits in (wide[:, :497], wide[:, :497].contiguous()):
        options: dict[str, Any] = {"rows_per_sequence": 1, "k": 16, "max_visible": 497}
        selected = launch(logits, seen, None, config=RESIDENT, **options)
        assert torch.equal(selected, select_slots_reference(logits, seen, None, **options))


def test_nothing_to_do() -> None:
    selected = select_slots(
        torch.empty(0, 9),
        torch.empty(0, dtype=torch.int64),
        None,
        rows_per_sequence=1,
        k=4,
        max_visible=9,
        backend="triton",
    )
    assert selected.shape == (0, 4)


def test_refusals() -> None:
    right: dict[str, Any] = {
        "logits": torch.zeros(4, 100),
        "visible": torch.zeros(4, dtype=torch.int64),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "rows_per_sequence": 2,
        "k": 8,
        "max_visible": 100,
        "backend": "triton",
    }
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"logits": torch.zeros(4, 100, dtype=torch.float64)}, "float64"),
        ({"logits": torch.zeros(100, 4).t()}, "contiguous"),
        ({"visible": torch.zeros(3)}, "visible is"),
        ({"visible": torch.tensor(5).expand(4)}, "visible must be contiguous"),
        ({"page_table": torch.zeros(1, 2)}, "a page table of"),
        ({"page_table": torch.zeros(2, 1)}, "a page table of"),
        ({"page_table": torch.zeros(2, 2).t()}, "contiguous"),
        ({"rows_per_sequence": 0}, "0 rows per sequence"),
        ({"k": 0}, "positive"),
        ({"k": 5000}, "above 4,096"),
        ({"max_visible": 101}, "fewer than 101"),
        ({"backend": "deterministic"}, "deterministic"),
    ]
    for change, message in wrong:
        with pytest.raises(UnsupportedKernel, match=message):
            select_slots(**(right | change))


@pytest.mark.parametrize("k", [1, 64, 256, 2048])
@pytest.mark.parametrize("max_visible", [1, 2048, 32768, 131072])
@pytest.mark.parametrize("num_rows", [1, 32, 128, 4096])
@pytest.mark.parametrize("nvidia", [False, True])
def test_a_configuration_holds_what_it_must(num_rows: int, max_visible: int, k: int, nvidia: bool) -> None:
    config = config_for(num_rows, max_visible, k, nvidia=nvidia)
    if config.kind in ("resident", "registers"):
        assert max_visible <= config.block <= 32768
    else:
        assert k <= config.candidates
        assert config.sample <= config.candidates


def compiled(config: Config, max_visible: int) -> list[Compiled]:
    """Of every kernel that the configuration launches at full size."""
    types: dict[str, str] = dict.fromkeys(("logits", "guesses", "thresholds"), "*fp32") | {
        "visible": "*i64",
        "scratch": "*i32",
    }
    types |= dict.fromkeys(("page_table", "out", "marks"), "*i32")
    types |= dict.fromkeys(("num_rows", "stride", "table_stride", "k", "wanted", "share"), "i32")
    constants = {"N": 1, "K_BLOCK": 2048, "TRANSLATE": True, "PAGE": PAGE_SIZE, "VECTOR": 4}
    constants |= {
        "BLOCK": config.block,
        "PART": config.block,
        "PIECES": config.pieces,
        "TILE": config.block,
        "SAMPLE": config.sample,
    }
    constants |= {"CANDIDATES": config.candidates, "STAGES": config.num_stages, "WORDS": max_visible // 32}
    kernels_of: dict[str, list[tuple[Any, int]]] = {
        "resident": [(kernels.select_slots._select_resident, config.num_warps)],
        "sampled": [(kernels.select_long.select_rows_by_sample, config.num_warps)],
        "shared": [
            (kernels.select_long.mark_shares, config.share_warps),
            (kernels.select_long.select_from_shares, config.num_warps),
        ],
        "registers": [(kernels.select_shared_rows.select_in_registers, config.num_warps)],
        "marked": [(kernels.select_shared_rows.select_by_marks, config.num_warps)],
        "parts": [
            (kernels.select_shared_rows.mark_parts, config.share_warps),
            (kernels.select_shared_rows.select_from_parts, config.num_warps),
        ],
    }
    found = []
    for kernel, num_warps in kernels_of[config.kind]:
        names = kernel.arg_names
        found.append(
            compile_for_hopper(
                kernel,
                {name: kind for name, kind in types.items() if name in names},
                {name: value for name, value in constants.items() if name in names},
                num_warps=num_warps,
                aligned=("stride", "k", "share"),
                maxnreg=config.registers,
            )
        )
    return found


# Bytes a thread spills, around the searches: 128 registers let two programs share an SM, 64 are what 1,024
# threads have.
SPILLED = {(4096, 2048): 0, (1, 32768): 32, (1, 131072): 32, (128, 131072): 96, (4096, 65536): 120}


@pytest.mark.parametrize(("num_rows", "max_visible"), SPILLED)
def test_compiles_for_hopper(num_rows: int, max_visible: int) -> None:
    for kernel in compiled(config_for(num_rows, max_visible, 2048), max_visible):
        assert kernel.spilled <= SPILLED[num_rows, max_visible]
        assert not re.search(r"(setp|min|max)\S*\.ftz", kernel.ptx)  # denormal scores are told apart
        assert "v4" in kernel.ptx  # four scores a load


# The same of the forms in shared memory, whose searches that do not end with the first guess spill.
SPILLED_IN_SHARED = {(1, 32768): 0, (32, 131072): 0, (128, 32768): 120, (128, 131072): 80, (4096, 65536): 232}
STATIC_SHARED = 20496  # what the PTX sets aside; beyond 48 KB in all, a launch must ask, and Triton does not


@pytest.mark.parametrize(("num_rows", "max_visible"), SPILLED_IN_SHARED)
def test_nvidia_forms_compile_for_hopper(num_rows: int, max_visible: int) -> None:
    for kernel in compiled(config_for(num_rows, max_visible, 2048, nvidia=True), max_visible):
        assert kernel.spilled <= SPILLED_IN_SHARED[num_rows, max_visible]
        assert not re.search(r"(setp|min|max)\S*\.ftz", kernel.ptx)  # denormal scores are told apart
        assert "v4" in kernel.ptx or "cp.async" in kernel.ptx
        assert f"selection[{STATIC_SHARED}]" in kernel.ptx
        assert kernel.shared + STATIC_SHARED <= 49152 or kernel.shared > 49152


BENCH_KINDS = ["normal", "narrow", "equal", "levels", "outlier", "sorted", "nearly all the same"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "num_scores"),
    [(1, 32768), (1, 131072), (32, 32768), (32, 131072), (128, 32768), (128, 131072), (300, 65536)],
)
def test_bench_shapes_on_a_gpu(num_rows: int, num_scores: int) -> None:
    for seed, kind in enumerate(BENCH_KINDS):
        logits = logits_of(kind, min(num_rows, 32), num_scores, seed, "cuda").repeat(-(-num_rows // 32), 1)
        logits = logits[:num_rows].contiguous()
        visible = torch.full((num_rows,), num_scores, device="cuda")
        page_table = torch.randperm(num_rows * (num_scores // PAGE_SIZE), device="cuda").view(num_rows, -1)
        options: dict[str, Any] = {"rows_per_sequence": 1, "k": 2048, "max_visible": num_scores}
        selected = select_slots(logits, visible, page_table, backend="triton", **options)
        some = slice(0, 8)
        wanted = select_slots_reference(logits[some], visible[some], page_table[some], **options)
        assert torch.equal(selected[some], wanted), kind
        if num_rows > 32:  # every row is one of the first 32
            rows: dict[str, Any] = {"logits": logits, "visible": visible, "page_table": None}
            positions = select_slots(**rows, backend="triton", **options)
            assert torch.equal(positions[32:64], positions[:32]), kind


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "num_scores"), [(9, 4096), (9, 32768), (9, 131072), (40, 131072), (300, 40000)]
)
def test_on_a_gpu(num_rows: int, num_scores: int) -> None:
    for seed, kind in enumerate(KINDS):
        logits = logits_of(kind, num_rows, num_scores, seed, "cuda")
        visible = torch.full((num_rows,), num_scores, device="cuda")
        lengths = [0, 1, 63, 64, 65, 2047, 2048, 2049]
        visible[1:9] = torch.tensor(lengths, device="cuda")
        logits = hidden_by_nan(logits, visible)
        page_table = torch.randperm(num_rows * (num_scores // PAGE_SIZE), device="cuda").view(num_rows, -1)
        options: dict[str, Any] = {"rows_per_sequence": 1, "k": 2048, "max_visible": num_scores}
        wanted = select_slots_reference(logits, visible, page_table, **options)
        assert torch.equal(select_slots(logits, visible, page_table, backend="triton", **options), wanted), (
            kind
        )


@pytest.mark.gpu
@pytest.mark.parametrize("num_scores", [300, 5000])
def test_demo_on_a_gpu(num_scores: int) -> None:
    logits = logits_of("few levels", 6, num_scores, 0, "cuda")
    visible = torch.tensor([0, 1, 255, 256, 257, num_scores], device="cuda")
    selected = select_slots(
        logits, visible, None, rows_per_sequence=1, k=256, max_visible=num_scores, backend="triton"
    )
    hidden = torch.arange(num_scores, device="cuda") >= visible.unsqueeze(1)
    assert torch.equal(selected, topk_reference(logits.masked_fill(hidden, -INF), 256))
