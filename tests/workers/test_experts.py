"""One expert worker: what it holds, what it answers, what it refuses."""

import threading
from collections.abc import Iterator

import pytest
import torch

from model.checkpoint import Checkpoint
from model.moe import DispatchPlan
from tests.checkpoints import DEMO
from tests.workers.expert_pool import LAYER, Pool, all_experts, demo_config, place, rows, thread_pool
from tests.workers.transport.processes import receive, soon
from workers.experts import ExpertWorker, Kind, Refusal, Urgency, load_experts
from workers.placement import PlacementError
from workers.transport.message import Message


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The workers' threads are enough, and a product's bits may depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def request(num_tokens: int = 3, **overrides: object) -> Message:
    x, plan = rows(num_tokens)
    tensors = x, plan.experts.to(torch.int16), plan.weights
    return Message(**{"kind": Kind.DISPATCH, "tensors": tensors, "epoch": 1, "layer": LAYER, **overrides})


def ask(pool: Pool, message: Message) -> Message:
    if not pool.endpoint.peers:
        pool.endpoint.connect(pool.source.placement.shares[0].address, soon())
    pool.endpoint.send("worker 0", message, soon())
    return receive(pool.endpoint).message


def test_a_share_loads_its_experts_only() -> None:
    part = load_experts(Checkpoint.open(DEMO), range(2, 4), torch.float32, "reference")
    x, plan = rows(20)
    expected = all_experts().block_sums(LAYER, x, plan, range(2, 4))
    assert torch.equal(part.block_sums(LAYER, x, plan, range(2, 4)), expected)
    assert torch.equal(part.forward(LAYER, x, plan), expected[0])
    with pytest.raises(AssertionError, match="not held here"):
        part.block_sums(LAYER, x, plan, range(1, 3))


def test_answer() -> None:
    x, plan = rows(3)
    with thread_pool(3) as pool:
        reply = ask(pool, request(sequence=8, step=9))
    assert (reply.kind, reply.epoch, reply.sequence, reply.step, reply.layer) == (
        Kind.COMBINE,
        1,
        8,
        9,
        LAYER,
    )
    # Groups 0, 1 and 2 are the blocks {0, 1} and {2}: two sums.
    assert torch.equal(reply.tensors[0], all_experts().block_sums(LAYER, x, plan, range(3)))
    assert reply.tensors[0].shape == (2, 3, demo_config().hidden_size)


def test_no_rows() -> None:
    empty = DispatchPlan(torch.empty(0, 8, dtype=torch.int64), torch.empty(0, 8))
    with thread_pool(1) as pool:
        tensors = torch.empty(0, demo_config().hidden_size), empty.experts.short(), empty.weights
        assert ask(pool, request(tensors=tensors)).tensors[0].shape == (1, 0, demo_config().hidden_size)


def test_refusals() -> None:
    x, experts, weights = request().tensors
    wrong: list[dict[str, object]] = [
        {"kind": Kind.COMBINE},
        {"kind": 99},
        {"layer": 0},  # a dense layer
        {"layer": -1},
        {"layer": 1000},
        {"tensors": ()},
        {"tensors": (x, experts)},
        {"tensors": (x[:2], experts, weights)},
        {"tensors": (x[:, :8], experts, weights)},
        {"tensors": (x.bfloat16(), experts, weights)},
        {"tensors": (x, experts.long(), weights)},
        {"tensors": (x, experts, weights.double())},
        {"tensors": (x, experts[:, :4], weights)},
        {"tensors": (torch.tensor(1.0), experts, weights)},
    ]
    with thread_pool(1) as pool:
        for overrides in wrong:
            reply = ask(pool, request(**overrides))
            assert reply.kind == Kind.REFUSED
            assert reply.tensors[0].tolist() == [Refusal.SHAPE]
        reply = ask(pool, request(epoch=2))
        assert (reply.kind, reply.epoch, reply.tensors[0].tolist()) == (Kind.REFUSED, 1, [Refusal.EPOCH])
        assert ask(pool, request()).kind == Kind.COMBINE
        assert (pool.workers[0].num_answered, pool.workers[0].num_refused) == (1, len(wrong) + 1)


def test_experts_of_nobody_add_nothing() -> None:
    """Numbers beyond the model, from a sender gone wrong: not ours, so not computed, and no access beyond."""
    x, experts, weights = request().tensors
    with thread_pool(1) as pool:
        reply = ask(pool, request(tensors=(x, torch.full_like(experts, 32000), weights)))
        assert reply.tensors[0].abs().max() == 0


def test_a_placement_that_asks_for_more_is_not_adopted() -> None:
    with thread_pool(2) as pool:
        worker = pool.workers[0]
        narrow = load_experts(Checkpoint.open(DEMO), range(4), torch.float32, "reference")
        worker._experts = narrow
        wide = place([share.address for share in pool.source.placement.shares[:1]], epoch=2)
        with pytest.raises(PlacementError):
            worker.adopt(wide)
        assert ask(pool, request()).epoch == 1


def test_late_requests_are_not_computed() -> None:
    with thread_pool(1) as pool:
        held = threading.Event()
        real = pool.workers[0]._compute

        def slow(message: Message) -> Message:
            held.wait(0.1)
            return real(message)

        pool.workers[0]._compute = slow  # type: ignore[method-assign]
        pool.endpoint.connect(pool.source.placement.shares[0].address, soon())
        for number, budget in enumerate((1_000_000, 50_000, 0)):
            message = request(sequence=number, budget_us=budget)
            pool.endpoint.send("worker 0", message, soon())
        assert [receive(pool.endpoint).message.sequence for _ in range(2)] in ([0, 2], [0, 1])
        pool.workers[0]._compute = real  # type: ignore[method-assign]


def test_decode_is_served_before_prefill_that_came_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    compute = ExpertWorker._compute

    def slowly(worker: ExpertWorker, message: Message) -> Message:
        started.set()
        assert go_on.wait(30)
        return compute(worker, message)

    monkeypatch.setattr(ExpertWorker, "_compute", slowly)
    with thread_pool(1) as pool:
        pool.endpoint.connect(pool.source.placement.shares[0].address, soon())
        for number in (1, 2, 3):
            pool.endpoint.send("worker 0", request(sequence=number, step=Urgency.PREFILL), soon())
        assert started.wait(30)
        pool.endpoint.send("worker 0", request(sequence=4, step=Urgency.DECODE), soon())
        go_on.set()
        order = [receive(pool.endpoint).message.sequence for _ in range(4)]
    assert order == [1, 4, 2, 3]
