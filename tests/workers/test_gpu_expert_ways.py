"""An engine whose experts are in other processes, by real carriers: tokens, and an expert that dies.

By CUDA IPC one GPU may do for all; NCCL wants two.
"""

import pytest
import torch

from benchmarks.split_tokens import CASES, compare, killed, requests, splits
from workers.transport.config import CarrierKind

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["ipc", "copy", "nccl"])
def test_tokens_are_those_of_one_process_and_a_death_costs_a_step(kind: CarrierKind) -> None:
    is_apart = torch.cuda.device_count() >= 2
    if kind == "nccl" and not is_apart:
        pytest.skip("NCCL wants a GPU for each process")
    (num_actors, first), *_ = CASES[kind]
    with splits([(kind, num_actors)], (0, 1) if is_apart else (0, 0)) as (split,):
        for _, config in CASES[kind]:
            found = compare(split, config, requests(24))
            assert found["same"] == found["requests"], found
        found = killed(split, first, requests(300))
        assert found["same"] == found["requests"], found
        assert f"experts-{num_actors - 1}" in found["lost"]
