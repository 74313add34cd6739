import random

import pytest

from workers.transport.page_carrier import runs


def test_runs() -> None:
    assert runs([], []) == []
    assert runs([4, 5, 6], [1, 2, 3]) == [(4, 1, 3)]
    assert runs([4, 5, 7, 8], [1, 2, 3, 4]) == [(4, 1, 2), (7, 3, 2)]
    assert runs([4, 5, 6, 7], [1, 2, 9, 10]) == [(4, 1, 2), (6, 9, 2)]
    assert runs([6, 5], [2, 1]) == [(6, 2, 1), (5, 1, 1)]
    with pytest.raises(ValueError, match="zip"):
        runs([1, 2], [1])


def test_runs_are_all_of_it() -> None:
    source, target = random.Random(0).sample(range(99), 40), random.Random(1).sample(range(50), 40)
    source[10:20], target[5:25] = range(200, 210), range(300, 320)
    found = [(a + i, b + i) for a, b, count in runs(source, target) for i in range(count)]
    assert found == list(zip(source, target, strict=True))
    assert len(runs(source, target)) <= 40 - 9
