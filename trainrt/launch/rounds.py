"""Which nodes are measured with which, and when: rounds of disjoint pairs, so that no measurement is in another one's way."""

from __future__ import annotations

import random
from collections.abc import Sequence

MOST_ROUNDS = 16
"""More would be more than a minute of a large cluster's time."""
Pair = tuple[str, str]


def tournament(nodes: Sequence[str]) -> list[list[Pair]]:
    """Every pair once, in the fewest rounds: N - 1 of them, N where N is odd. The circle method."""
    circle: list[str | None] = list(nodes)
    if len(circle) % 2:
        circle.append(None)
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle.insert(1, circle.pop())
    return [pairs for pairs in rounds if pairs]


def neighbours(nodes: Sequence[str]) -> list[list[Pair]]:
    """The pairs of a ring in two rounds, three where their number is odd."""
    if len(nodes) < 2:
        return []
    if len(nodes) == 2:
        return [[(nodes[0], nodes[1])]]
    edges = [(node, nodes[(index + 1) % len(nodes)]) for index, node in enumerate(nodes)]
    last = [edges.pop()] if len(edges) % 2 else []
    return [pairs for pairs in (edges[0::2], edges[1::2], last) if pairs]


def pair_rounds(nodes: Sequence[str], *, most: int = MOST_ROUNDS, seed: int = 0) -> tuple[list[list[Pair]], bool]:
    """Rounds for the bandwidth of pairs, and whether all pairs are among them.

    Where all would need more than `most` rounds: a ring's neighbours, and rounds of the tournament drawn by the seed.
    """
    every = tournament(nodes)
    if len(every) <= most:
        return every, True
    ring = neighbours(nodes)
    known = {frozenset(pair) for pairs in ring for pair in pairs}
    drawn = random.Random(seed).sample(every, most - len(ring))
    return [*ring, *([pair for pair in pairs if frozenset(pair) not in known] for pairs in drawn)], False
