"""Experts elsewhere: the same bits however they are split, epochs, and workers that are lost."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from model.checkpoint import Checkpoint
from model.decoder import Decoder
from model.moe import DispatchPlan
from tests.checkpoints import DEMO
from tests.running import lookup_documents, run
from tests.workers.expert_pool import (
    LAYER,
    all_experts,
    place,
    process_pool,
    rows,
    thread_pool,
)
from workers.dispatch import WorkerFailed, WorkerLost
from workers.placement import TooManyNodes
from workers.transport.protocol import DeadlineExceeded


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The workers' threads are enough, and a product's bits may depend on how many threads share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_a_split_changes_no_bit(num_workers: int, num_tokens: int) -> None:
    x, plan = rows(num_tokens)
    with thread_pool(num_workers) as pool:
        assert torch.equal(pool.experts.forward(LAYER, x, plan), all_experts().forward(LAYER, x, plan))
        stats = pool.experts.stats
        assert (stats.layers, stats.tokens) == (1, num_tokens)
        assert stats.copies <= num_tokens * min(num_workers, 4)
        assert stats.most_nodes <= min(num_workers, 4)


def test_copies_are_counted_by_worker() -> None:
    x, plan = rows(33)
    with thread_pool(8) as pool:
        pool.experts.forward(LAYER, x, plan)
        shares = pool.source.placement.shares
        counted = dict(pool.experts.stats.copies_to)
    config = Checkpoint.open(DEMO).config
    groups = plan.experts // (config.n_routed_experts // config.n_group)
    held = {share.peer: torch.tensor(list(share.groups)) for share in shares}
    expected = {peer: int(torch.isin(groups, own).any(dim=1).sum()) for peer, own in held.items()}
    assert counted == {peer: count for peer, count in expected.items() if count}


def test_hidden_states_of_the_demo() -> None:
    """The whole model with its experts here, in 1, 2, 4 and 8 threads, and in 2 processes."""
    checkpoint = Checkpoint.open(DEMO)
    weights = checkpoint.load(dtype=torch.float32)
    document = lookup_documents()[0][:80]

    def hidden(experts: object) -> torch.Tensor:
        decoder = Decoder(checkpoint.config, type(weights)(weights), experts, mode="sparse")  # type: ignore[arg-type]
        return run(decoder, document, chunk=40).hidden

    expected = hidden(all_experts())
    for num_workers in (1, 2, 4, 8):
        with thread_pool(num_workers) as pool:
            assert torch.equal(hidden(pool.experts), expected)
    with process_pool(["shared_memory", "tcp"]) as (pool, _):
        assert torch.equal(hidden(pool.experts), expected)


def test_several_pending_in_any_order() -> None:
    inputs = [rows(5, seed) for seed in range(6)]
    with thread_pool(4) as pool:
        pending = [pool.experts.submit(LAYER, x, plan) for x, plan in inputs]
        for place_of in (3, 0, 5, 1, 4, 2):
            expected = all_experts().forward(LAYER, *inputs[place_of])
            assert torch.equal(pending[place_of].result(), expected)
        assert pool.experts._pending == {}


def test_results_do_not_share_memory_with_anything() -> None:
    """The model adds the shared expert in place."""
    x, plan = rows(1)
    with thread_pool(8) as pool:
        first = pool.experts.forward(LAYER, x, plan)
        first.fill_(9.0)
        assert torch.equal(pool.experts.forward(LAYER, x, plan), all_experts().forward(LAYER, x, plan))


def test_workers_that_know_a_later_placement() -> None:
    """They refuse the old epoch; the layer is sent again as soon as the new one is known here."""
    x, plan = rows(9)
    with thread_pool(4) as pool:
        pool.experts.forward(LAYER, x, plan)
        addresses = [share.address for share in pool.source.placement.shares]
        new = place(addresses[:2], epoch=2)
        for worker in pool.workers[:2]:
            worker.adopt(new)

        def learn() -> None:
            pool.source.placement = new

        timer = threading.Timer(0.05, learn)
        timer.start()
        assert torch.equal(pool.experts.forward(LAYER, x, plan), all_experts().forward(LAYER, x, plan))
        timer.join()
        assert pool.experts.stats.retries >= 1
        assert sum(worker.num_refused for worker in pool.workers) >= 1


def test_workers_that_are_behind() -> None:
    x, plan = rows(9)
    with thread_pool(2) as pool:
        new = place([share.address for share in reversed(pool.source.placement.shares)], epoch=2)
        pool.source.placement = new
        pool.workers[0].adopt(new)
        timer = threading.Timer(0.05, pool.workers[1].adopt, [new])
        timer.start()
        assert torch.equal(pool.experts.forward(LAYER, x, plan), all_experts().forward(LAYER, x, plan))
        timer.join()


def test_epochs_that_never_agree() -> None:
    x, plan = rows(2)
    with thread_pool(2, layer_seconds=0.2) as pool:
        pool.source.placement = place([share.address for share in pool.source.placement.shares], epoch=5)
        with pytest.raises(DeadlineExceeded, match="epoch"):
            pool.experts.forward(LAYER, x, plan)
        assert pool.experts._pending == {}


def test_more_nodes_than_topk_group() -> None:
    x, _ = rows(1)
    wide = DispatchPlan(torch.tensor([[0, 4, 8, 12, 16, 20, 24, 28]]), torch.ones(1, 8))
    with thread_pool(8) as pool:
        with pytest.raises(TooManyNodes):
            pool.experts.submit(LAYER, x, wide)
        assert pool.experts._pending == {}
    with thread_pool(4) as pool:  # 8 groups, and yet 4 nodes
        assert torch.equal(pool.experts.forward(LAYER, x, wide), all_experts().forward(LAYER, x, wide))


def test_a_worker_of_another_model() -> None:
    x, plan = rows(2)
    with thread_pool(2) as pool, pytest.raises(WorkerFailed):
        pool.experts.forward(LAYER, x.bfloat16(), plan)


@pytest.mark.parametrize("carrier", ["shared_memory", "tcp"])
def test_a_killed_worker_is_lost_when_the_layer_s_time_is_over(carrier: str) -> None:
    x, plan = rows(50)
    with process_pool([carrier, carrier], layer_seconds=1.0) as (pool, processes):
        expected = pool.experts.forward(LAYER, x, plan)
        processes[1].signal(signal.SIGSTOP)  # so that it is certain to be killed while we wait
        pending = pool.experts.submit(LAYER, x, plan)
        threading.Timer(0.1, processes[1].signal, [signal.SIGKILL]).start()
        started = time.monotonic()
        with pytest.raises(WorkerLost) as caught:
            pending.result()
        assert time.monotonic() - started < 5
        assert caught.value.peer == "worker 1"
        with pytest.raises(WorkerLost):
            pool.experts.forward(LAYER, x, plan)
        assert pool.experts._pending == {}
        with process_pool([carrier]) as (other, _):  # another pool computes the layer again
            assert torch.equal(other.experts.forward(LAYER, x, plan), expected)


def test_a_layer_whose_worker_is_killed_goes_to_the_next_placement() -> None:
    x, plan = rows(50)
    with (
        process_pool(["shared_memory"] * 2) as (pool, processes),
        process_pool(["tcp"], first=2, epoch=2) as (successor, _),
    ):
        expected = pool.experts.forward(LAYER, x, plan)
        processes[1].signal(signal.SIGSTOP)
        pending = pool.experts.submit(LAYER, x, plan)
        processes[1].signal(signal.SIGKILL)

        def learn() -> None:
            pool.source.placement = successor.source.placement

        timer = threading.Timer(0.3, learn)
        timer.start()
        assert torch.equal(pending.result(), expected)
        timer.join()
        assert pool.experts.stats.retries == 1
        processes[0].signal(signal.SIGKILL)  # nobody needs it any more
        assert torch.equal(pool.experts.forward(LAYER, x, plan), expected)


def test_a_frozen_worker_meets_the_deadline() -> None:
    x, plan = rows(50)
    with process_pool(["shared_memory"], layer_seconds=0.5) as (pool, processes):
        pool.experts.forward(LAYER, x, plan)
        processes[0].signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="worker 0"):
            pool.experts.forward(LAYER, x, plan)
        assert time.monotonic() - started < 5
        processes[0].signal(signal.SIGCONT)
        time.sleep(0.1)  # its late answer must not be taken for the next one
        x, plan = rows(50, seed=1)
        assert torch.equal(pool.experts.forward(LAYER, x, plan), all_experts().forward(LAYER, x, plan))


def test_a_connection_that_was_lost_is_made_again() -> None:
    x, plan = rows(4)
    with thread_pool(2) as pool:
        expected = pool.experts.forward(LAYER, x, plan)
        for share in pool.source.placement.shares:
            pool.endpoint.disconnect(share.peer)
        assert torch.equal(pool.experts.forward(LAYER, x, plan), expected)
