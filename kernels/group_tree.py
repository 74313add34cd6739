"""The order in which the sums of expert groups are added: a tree, so that every split makes the same bits."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Sum = TypeVar("Sum")


def blocks_of(groups: range) -> tuple[range, ...]:
    """The fewest aligned blocks that make up a run of groups, in order."""
    blocks = []
    start = groups.start
    while start < groups.stop:
        size = 1 << ((groups.stop - start).bit_length() - 1)
        if start:
            size = min(size, start & -start)
        blocks.append(range(start, start + size))
        start += size
    return tuple(blocks)


def add_in_tree(
    parts: Iterable[tuple[range, Sum]], add: Callable[[Sum, Sum], Sum]
) -> list[tuple[range, Sum]]:
    """Add neighbouring blocks as long as two of them make one block of the tree.

    Args:
        parts: aligned blocks in ascending order, without gaps, and their sums.
        add: left and right to their sum; it may reuse the left one's memory.

    Returns:
        What remains: one block if the parts fill one, otherwise `blocks_of` the whole run.
    """
    stack: list[tuple[range, Sum]] = []
    for block, value in parts:
        while stack and len(stack[-1][0]) == len(block) and stack[-1][0].start % (2 * len(block)) == 0:
            left, left_value = stack.pop()
            block, value = range(left.start, block.stop), add(left_value, value)
        stack.append((block, value))
    return stack


def add_all(parts: Iterable[tuple[range, Sum]], add: Callable[[Sum, Sum], Sum]) -> Sum:
    """The root of the tree; where the number of groups is no power of two, the missing ones are left out."""
    (_, total), *others = reversed(add_in_tree(parts, add))
    for _, value in others:
        total = add(value, total)
    return total
