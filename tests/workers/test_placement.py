"""Placements that are complete, lists of nodes, and the tree in which sums are made."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.group_tree import add_all, add_in_tree, blocks_of
from model.moe import DispatchPlan
from workers.placement import ExpertPlacement, ExpertShare, PlacementError, TooManyNodes, node_lists
from workers.transport.protocol import Address


def shares(*groups: range) -> tuple[ExpertShare, ...]:
    return tuple(ExpertShare(Address(f"w{i}"), run) for i, run in enumerate(groups))


@pytest.mark.parametrize(
    "groups",
    [
        (range(4),),
        (range(4), range(5, 8)),
        (range(5), range(4, 8)),
        (range(4, 8), range(4)),
        (range(9),),
        (range(4), range(4, 4), range(4, 8)),
        (range(0, 8, 2),),
        (),
    ],
)
def test_shares_must_be_complete_and_disjoint(groups: tuple[range, ...]) -> None:
    with pytest.raises(PlacementError):
        ExpertPlacement(1, 32, 8, shares(*groups))


def test_other_placements_that_cannot_be() -> None:
    same = ExpertShare(Address("w"), range(4)), ExpertShare(Address("w"), range(4, 8))
    with pytest.raises(PlacementError, match="two shares"):
        ExpertPlacement(1, 32, 8, same)
    with pytest.raises(PlacementError, match="equal groups"):
        ExpertPlacement(1, 33, 8, shares(range(8)))
    with pytest.raises(PlacementError, match="workers"):
        ExpertPlacement.even(1, 32, 8, [Address(f"w{i}") for i in range(9)])


def test_even_and_who_holds_what() -> None:
    placement = ExpertPlacement.even(7, 32, 8, [Address("a"), Address("b"), Address("c")])
    assert [share.groups for share in placement.shares] == [range(3), range(3, 6), range(6, 8)]
    assert placement.share_of_expert.tolist() == [0] * 12 + [1] * 12 + [2] * 8
    assert placement.share_of("b") == placement.shares[1]
    assert placement.share_of("d") is None


def plan(*experts: list[int]) -> DispatchPlan:
    return DispatchPlan(torch.tensor(experts), torch.ones(len(experts), len(experts[0])))


def test_each_node_once_a_token() -> None:
    placement = ExpertPlacement.even(1, 32, 8, [Address(name) for name in "abcd"])
    lists, most = node_lists(plan([0, 1, 7, 9], [8, 9, 10, 11], [31, 1, 2, 3]), placement, 4)
    assert [(share.peer, rows.tolist()) for share, rows in lists] == [
        ("a", [0, 2]),
        ("b", [0, 1]),
        ("d", [2]),
    ]
    assert most == 2


def test_more_nodes_than_the_router_may_choose() -> None:
    placement = ExpertPlacement.even(1, 32, 8, [Address(name) for name in "abcdefgh"])
    with pytest.raises(TooManyNodes) as caught:
        node_lists(plan([0, 1, 2, 3], [0, 4, 8, 12]), placement, 3)
    assert (caught.value.token, caught.value.num_nodes, caught.value.limit) == (1, 4, 3)


@pytest.mark.parametrize("expert", [-1, 32])
def test_experts_that_are_not_there(expert: int) -> None:
    placement = ExpertPlacement.even(1, 32, 8, [Address("a")])
    with pytest.raises(IndexError):
        node_lists(plan([expert, 1]), placement, 4)


def test_no_tokens() -> None:
    placement = ExpertPlacement.even(1, 32, 8, [Address("a")])
    empty = DispatchPlan(torch.empty(0, 4, dtype=torch.int64), torch.empty(0, 4))
    assert node_lists(empty, placement, 4) == ([], 0)


@given(st.integers(0, 40), st.integers(0, 40))
def test_blocks(start: int, length: int) -> None:
    groups = range(start, start + length)
    blocks = blocks_of(groups)
    assert [group for block in blocks for group in block] == list(groups)
    for block in blocks:
        assert len(block).bit_count() == 1
        assert block.start % len(block) == 0
    assert len(blocks) <= 2 * max(1, length.bit_length())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_every_split_makes_the_same_tree(lengths: list[int]) -> None:
    """The sum as a text shows in which order it was made."""
    num_groups = sum(lengths)
    leaves = [(range(g, g + 1), f"g{g}") for g in range(num_groups)]

    def add(left: str, right: str) -> str:
        return f"({left} + {right})"

    parts: list[tuple[range, str]] = []
    start = 0
    for length in lengths:
        held = range(start, start + length)
        sums = add_in_tree(leaves[start : start + length], add)
        assert tuple(block for block, _ in sums) == blocks_of(held)
        parts.extend(sums)
        start += length
    assert add_all(parts, add) == add_all(leaves, add)


def test_the_tree_of_eight() -> None:
    leaves = [(range(g, g + 1), str(g)) for g in range(8)]
    total = add_all(leaves, lambda left, right: f"({left}{right})")
    assert total == "(((01)(23))((45)(67)))"
