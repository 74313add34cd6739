"""Attention in this thread, experts in others, over carriers: the demo as fused twins, on the CPU."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.block_sum import block_sum
from kernels.group_tree import blocks_of
from kernels.list_rows import RoutedRows, list_rows
from kernels.quantize_rows import quantize_rows
from model.checkpoint import Checkpoint, Weights
from model.config import ModelConfig
from model.decoder import Decoder, MicroBatch
from model.fused.feed_forward import FusedExperts, Quantized
from model.fused.layer import FusedLayer
from model.inputs import ForwardInputs
from model.moe import DispatchPlan, Done, Experts, PendingSum
from model.pages import PageCache
from tests.checkpoints import DEMO
from tests.running import lookup_documents, num_pages_for
from tests.workers.gpu_carriers import DirectRunner, ThreadCarrier, carrier_pair
from workers.gpu_dispatch import CarrierExperts, ExpertPeer
from workers.gpu_experts import STEP, BadPlan, ExpertStepper, StepPlan
from workers.transport.carrier import CarrierFailed
from workers.transport.message import MalformedMessage, Message


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MAX_ROWS, NUM_SLOTS = 512, 3
SURE_MARGIN = 1.0  # of a token that the rounding of sums does not change


@cache
def demo_config() -> ModelConfig:
    return Checkpoint.open(DEMO).config


@cache
def demo_weights() -> Weights:
    return Checkpoint.open(DEMO).load(dtype=torch.bfloat16, widen=False)


@cache
def experts_of_groups(groups: range) -> FusedExperts:
    return FusedExperts(demo_config(), Weights(demo_weights()), groups, "reference")


def decoder_with(experts: Experts) -> Decoder:
    return Decoder(
        demo_config(), Weights(demo_weights()), experts, backend="reference", layer_class=FusedLayer
    )


@dataclass(frozen=True)
class Rounding:
    """All experts in this process; their sums are rounded to bf16, as those that travel are."""

    inner: FusedExperts
    listed: range

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        raise NotImplementedError

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        sums = self.inner.block_sums(layer, x, plan)
        parts = [(self.inner.groups, sums[0])]
        return Done(block_sum(parts, shared(), dtype=torch.bfloat16, backend="reference"))


@cache
def whole() -> Decoder:
    """Attention and experts in one process."""
    return decoder_with(experts_of_groups(range(demo_config().n_group)))


@cache
def rounding() -> Decoder:
    """The same, with the rounding of one peer."""
    inner = experts_of_groups(range(demo_config().n_group))
    return decoder_with(Rounding(inner, inner.listed))


def moe_layers(*, mtp: bool = False) -> tuple[int, ...]:
    config = demo_config()
    layers = range(config.num_hidden_layers) if not mtp else [config.num_hidden_layers]
    return tuple(layer for layer in layers if not config.is_dense(layer))


@dataclass
class Pool:
    """The experts' ends, each with a thread that runs what its host is told."""

    experts: CarrierExperts
    steppers: list[ExpertStepper]
    runners: list[DirectRunner]
    carriers: list[ThreadCarrier]
    failures: list[Exception]


@contextmanager
def pool(*held: range, wait_seconds: float = 20.0) -> Iterator[Pool]:
    """One experts' end for each run of groups."""
    threads: list[threading.Thread] = []
    found = Pool(None, [], [], [], [])  # type: ignore[arg-type]
    peers = []
    for number, groups in enumerate(held):
        ours, theirs = carrier_pair(("attention", f"experts {number}"), NUM_SLOTS, wait_seconds)
        runner = DirectRunner()
        stepper = ExpertStepper(
            demo_config(),
            experts_of_groups(groups),
            theirs,
            runner,
            max_rows=MAX_ROWS,
            num_slots=NUM_SLOTS,
            step_seconds=wait_seconds,
        )
        peers.append(ExpertPeer(ours, groups, teller(stepper, threads, found.failures)))
        found.steppers.append(stepper)
        found.runners.append(runner)
        found.carriers.extend((ours, theirs))
    found.experts = CarrierExperts(demo_config(), peers, num_slots=NUM_SLOTS, backend="reference")
    try:
        yield found
    finally:
        for thread in threads:
            thread.join()  # their waits have deadlines


def teller(
    stepper: ExpertStepper, threads: list[threading.Thread], failures: list[Exception]
) -> Callable[[StepPlan], None]:
    """Every step in a thread of its own, one after another."""

    def run(plan: StepPlan, before: threading.Thread | None) -> None:
        if before:
            before.join()
        try:
            stepper.run(plan)
            stepper.finish()
        except (CarrierFailed, BadPlan) as failure:
            failures.append(failure)

    last: list[threading.Thread] = []

    def tell(plan: StepPlan) -> None:
        thread = threading.Thread(target=run, args=(plan, last[-1] if last else None))
        last.append(thread)
        threads.append(thread)
        thread.start()

    return tell


LENGTHS = [300, 14, 1, 90]  # the first goes beyond index_topk


def inputs_of(sequences: range, start: int = 0, length: int | None = None) -> ForwardInputs:
    """Prompts of `LENGTHS`, or tokens that follow them, each with pages of its own."""
    document = [token for document in lookup_documents() for token in document]
    return ForwardInputs.build(
        [document[100 * number + start :][: length or LENGTHS[number]] for number in sequences],
        [LENGTHS[number] if length else 0 for number in sequences],
        [list(range(6 * n, 6 * n + num_pages_for(LENGTHS[n] + 8))) for n in sequences],
    )


def new_cache() -> PageCache:
    return PageCache(demo_config(), 24, "fp8", torch.bfloat16, backend="reference")


def announced(pool: Pool, decoder: Decoder, inputs: list[ForwardInputs], cache: PageCache) -> Tensor:
    """One step as an engine would run it."""
    rows = tuple(part.num_rows for part in inputs)
    pool.experts.announce(StepPlan(rows, moe_layers(), captured=inputs[0].segments[0].num_rows < 5))
    hidden = decoder.forward_in_turn([MicroBatch(part) for part in inputs], cache)
    pool.experts.check()
    return torch.cat(hidden)


@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 4), (0, 1, 3, 4)])
def test_prompts_and_decode_steps_have_the_bits_of_one_process(cuts: tuple[int, ...]) -> None:
    """Micro-batches 1 to 3, prompts and then two steps that decode; with less rounding, the tokens."""
    caches = [new_cache() for _ in range(3)]
    parts = [range(*cut) for cut in pairwise(cuts)]
    with pool(range(8)) as experts, torch.inference_mode():
        split = decoder_with(experts.experts)
        for step in range(3):
            arguments = (0, None) if step == 0 else (50 + 2 * step, 2)
            inputs = [inputs_of(part, *arguments) for part in parts]
            found = announced(experts, split, inputs, caches[0])
            batches = [MicroBatch(part) for part in inputs]
            assert torch.equal(found, torch.cat(rounding().forward_in_turn(batches, caches[1])))
            assert_same_tokens(found, whole().forward(inputs_of(range(4), *arguments), caches[2]))
    assert experts.failures == []
    assert experts.runners[0].num_captured == 1, "the plan of both decode steps, once"


def assert_same_tokens(found: Tensor, expected: Tensor) -> None:
    ours, theirs = whole().logits(found), whole().logits(expected)
    best = theirs.topk(2).values
    sure = best[:, 0] - best[:, 1] > SURE_MARGIN
    assert torch.equal(ours.argmax(-1)[sure], theirs.argmax(-1)[sure])
    assert sure.any()


@pytest.mark.parametrize(
    "held",
    [[range(8)], [range(4), range(4, 8)], [range(3), range(3, 8)], [range(g, g + 1) for g in range(8)]],
)
def test_a_layer_is_that_of_one_process_but_for_the_rounding_of_sums(held: list[range]) -> None:
    """Groups split evenly and not; the shared expert's rows are added after all sums."""
    config, layer = demo_config(), moe_layers()[0]
    x, plan, shared = rows(21)
    choice = list_rows(
        *plan,
        all_experts=config.n_routed_experts,
        num_groups=config.n_group,
        first_expert=0,
        num_experts=config.n_routed_experts,
        backend="reference",
    )
    expected = experts_of_groups(range(8)).forward(layer, x, choice, shared, torch.float32)
    with pool(*held) as experts, torch.inference_mode():
        experts.experts.announce(StepPlan((21,), (layer, layer)))
        first = experts.experts.submit_quantized(layer, x, choice, lambda: shared).result()
        second = experts.experts.submit(layer, dequantized(x), DispatchPlan(plan[0].long(), plan[1])).result()
    assert experts.failures == []
    assert first.dtype == torch.bfloat16
    assert second.dtype == torch.float32
    bound = sum(part.abs() for part in blocks_sums(layer, x, plan, held)) + expected.abs()
    assert ((first.float() - expected).abs() <= bound * 2**-8).all()
    assert ((second + shared.float() - expected).abs() <= bound * 2**-8).all()


def rows(num_rows: int) -> tuple[Quantized, tuple[Tensor, Tensor], Tensor]:
    """Quantised rows, a choice of experts, and rows of a shared expert."""
    config, generator = demo_config(), torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, config.hidden_size, generator=generator).bfloat16()
    keys = torch.rand(num_rows, config.n_routed_experts, generator=generator)
    experts = keys.topk(config.num_experts_per_tok).indices.sort(-1).values.int()
    weights = torch.rand(num_rows, config.num_experts_per_tok, generator=generator)
    shared = torch.randn(num_rows, config.hidden_size, generator=generator).bfloat16()
    return quantize_rows(x, backend="reference"), (experts, weights), shared


def dequantized(x: Quantized) -> Tensor:
    values, scales = x
    return (values.float().unflatten(1, (-1, 128)) * scales.unsqueeze(-1)).flatten(1)


def blocks_sums(layer: int, x: Quantized, plan: tuple[Tensor, Tensor], held: list[range]) -> list[Tensor]:
    """The sums that travel, not rounded."""
    out = []
    for block in (block for groups in held for block in blocks_of(groups)):
        there = experts_of_groups(block)
        out.append(there.forward(layer, x, there.list_rows(*plan), None, torch.float32))
    return out


def test_the_mtp_layer_is_a_plan_of_its_own() -> None:
    cache, expected_cache = new_cache(), new_cache()
    inputs = inputs_of(range(4))
    hidden = torch.randn(inputs.num_rows, demo_config().hidden_size).bfloat16()
    with pool(range(8)) as experts, torch.inference_mode():
        split = decoder_with(experts.experts)
        experts.experts.announce(StepPlan((inputs.num_rows,), moe_layers(mtp=True)))
        found = split.draft(inputs, hidden, cache)
        experts.experts.check()
        assert torch.equal(found, rounding().draft(inputs, hidden, expected_cache))


def test_a_peer_that_dies_ends_the_step_on_both_ends() -> None:
    """Its carrier is aborted by who watches the connection; then the others' steps are thrown away too."""
    with pool(range(4), range(4, 8)) as experts, torch.inference_mode():
        split = decoder_with(experts.experts)
        inputs = [inputs_of(range(2)), inputs_of(range(2, 4))]
        announced(experts, split, inputs, new_cache())
        ours, dead, _, alive = experts.carriers
        dead.abort("killed")
        threading.Timer(0.2, ours.abort, ["the connection ended"]).start()
        with pytest.raises(CarrierFailed, match="experts 0: the connection ended"):
            announced(experts, split, inputs, new_cache())
        experts.experts.abort("experts 0 is gone")
        alive.abort("attention has thrown the step away")
    assert {str(failure) for failure in experts.failures} >= {"carrier to attention: killed"}
    for stepper, carrier in zip(experts.steppers, (dead, alive), strict=True):
        with pytest.raises(CarrierFailed):
            stepper.finish()
        with pytest.raises(CarrierFailed):
            stepper.run(StepPlan((1,), moe_layers()))
        assert not carrier.is_closed
        stepper.close("pairing anew")
        assert carrier.is_closed


def test_who_says_nothing_is_not_waited_for_for_ever() -> None:
    with pool(range(8), wait_seconds=0.2) as experts, torch.inference_mode():
        experts.experts.announce(StepPlan((1,), moe_layers()))
    assert [str(failure) for failure in experts.failures] == ["carrier to attention: no message in time"]


def test_a_step_that_fails_at_the_attention_is_given_up_at_the_experts() -> None:
    """Rows of both micro-batches are at the experts then, and nobody takes them."""

    def fail(layer: int) -> None:
        if layer == moe_layers()[1]:
            raise RuntimeError("out of something")

    inputs = [inputs_of(range(2)), inputs_of(range(2, 4))]
    with pool(range(8)) as experts, torch.inference_mode():
        split = decoder_with(experts.experts)
        experts.experts.announce(StepPlan(tuple(part.num_rows for part in inputs), moe_layers()))
        with pytest.raises(RuntimeError, match="out of something"):
            split.forward_in_turn([MicroBatch(inputs[0]), MicroBatch(inputs[1], on_layer=fail)], new_cache())
        with pytest.raises(CarrierFailed, match="a step was given up"):
            experts.experts.check()
        experts.carriers[1].abort("attention has given up")
    assert [str(failure) for failure in experts.failures] == ["carrier to attention: attention has given up"]


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (StepPlan((1, 1, 1, 1), (3,)), "4 micro-batches, 1 to 3 fit"),
        (StepPlan((), (3,)), "0 micro-batches"),
        (StepPlan((513,), (3,)), "513 rows, 1 to 512 fit"),
        (StepPlan((4, 0), (3,)), "0 rows"),
        (StepPlan((4,), (3, 0)), "layer 0 has no experts here"),
        (StepPlan((4,), (99,)), "layer 99"),
        (StepPlan((4,), (3,) * 257), "257 layers, at most 256 fit"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: StepPlan, problem: str) -> None:
    with pool(range(8)) as experts, pytest.raises(BadPlan, match=problem):
        experts.steppers[0].run(plan)


def test_graphs_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever announces another plan each time must not fill the experts' memory."""
    monkeypatch.setattr("workers.gpu_experts._MOST_GRAPHS", 2)
    with pool(range(8)) as experts:
        stepper = experts.steppers[0]
        for num_rows in (1, 2, 1, 2):
            stepper.run(StepPlan((num_rows,), (), captured=True))
        stepper.run(StepPlan((3,), ()))
        with pytest.raises(BadPlan, match="2 other plans have been captured"):
            stepper.run(StepPlan((3,), (), captured=True))


def test_a_plan_travels() -> None:
    plan = StepPlan((5, 300), tuple(range(3, 61)), captured=True)
    assert StepPlan.of(plan.message(epoch=7)) == plan
    assert plan.message(epoch=7).epoch == 7
    for tensors in ((), (torch.zeros(2),) * 2, (torch.zeros(1, 1, dtype=torch.int32),) * 2):
        with pytest.raises(MalformedMessage):
            StepPlan.of(Message(STEP, tensors))
