"""An engine whose experts are in other processes, by real carriers: tokens, and an expert that dies.

By CUDA IPC one GPU may do for all; NCCL wants two, and has one expert actor then.
"""

import time

import pytest
import torch

from model.sampling_params import SamplingParams
from tests.workers.conftest import OraclePrompt
from tests.workers.split_processes import split
from workers.engine import EngineConfig
from workers.sequence import Request
from workers.transport.config import CarrierKind

pytestmark = pytest.mark.gpu


def gpus_for(kind: CarrierKind) -> tuple[int, int]:
    if torch.cuda.device_count() >= 2:
        return 0, 1
    if kind == "nccl":
        pytest.skip("NCCL wants a GPU for each process")
    return 0, 0


def requests(oracle: dict[str, OraclePrompt], max_tokens: int) -> list[Request]:
    """Greedy and sampled ones, one with a prompt of several chunks."""
    return [
        Request(
            name,
            oracle[name].prompt_ids,
            SamplingParams(max_tokens=max_tokens + n, temperature=0.8 * (n % 2), seed=n, ignore_eos=True),
        )
        for n, name in enumerate(("chat", "lookup_300", "code", "lookup_1000"))
    ]


@pytest.mark.parametrize(
    ("kind", "num_actors", "num_drafts", "micro_batches"),
    [
        ("ipc", 1, 0, 1),
        ("ipc", 2, 2, 2),
        ("copy", 2, 0, 3),
        ("copy", 1, 3, 1),
        ("nccl", 1, 0, 2),
        ("nccl", 1, 1, 1),
    ],
)
def test_tokens_are_those_of_one_process(
    oracle: dict[str, OraclePrompt], kind: CarrierKind, num_actors: int, num_drafts: int, micro_batches: int
) -> None:
    config = EngineConfig(100, num_drafts, micro_batches=micro_batches, sequences=8)
    asked = requests(oracle, 24)
    with split(kind, num_actors, config, asked, gpus_for(kind)) as processes:
        processes.attention.pipe.send(processes.next_epoch())
        expected, alone = processes.attention.hear()
        assert all(len(expected[request.uid]) == request.params.max_tokens for request in asked)
        times = [alone]
        for _ in range(2):  # the second time everything is recorded
            processes.attention.pipe.send(None)
            found, seconds = processes.attention.hear()
            assert found == expected
            times.append(seconds)
    print(kind, num_actors, num_drafts, micro_batches, [round(seconds, 3) for seconds in times], flush=True)


@pytest.mark.parametrize("kind", ["ipc", "nccl"])
def test_an_expert_that_dies_is_replaced(oracle: dict[str, OraclePrompt], kind: CarrierKind) -> None:
    """Killed while steps run: they are lost soon, and the same tokens come from its successor."""
    num_actors = 2 if kind == "ipc" else 1
    asked = requests(oracle, 200)
    with split(kind, num_actors, EngineConfig(100, sequences=8), asked, gpus_for(kind)) as processes:
        processes.attention.pipe.send(processes.next_epoch())
        expected, _ = processes.attention.hear()
        processes.attention.pipe.send(None)
        found, _ = processes.attention.hear()
        assert found == expected
        processes.attention.pipe.send(None)
        time.sleep(0.3)
        killed = time.monotonic()
        processes.experts[-1].kill()
        lost, why = processes.attention.hear()
        print(kind, f"lost after {time.monotonic() - killed:.3f} s: {why}", flush=True)
        assert lost == "lost"
        assert f"experts-{num_actors - 1}" in why
        assert time.monotonic() - killed < 5
        processes.start(num_actors - 1)
        processes.attention.pipe.send(processes.next_epoch())
        found, _ = processes.attention.hear()
        assert found == expected
