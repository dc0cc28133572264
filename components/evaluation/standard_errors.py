"""Standard errors of ratios of sums over documents, by the delta method."""

import math


def influences(pairs: list[tuple[float, int]]) -> list[float]:
    """What each document adds to sum(x) / sum(n), to first order; they sum to zero.

    Args:
        pairs: per document x and its size n (tokens, bytes, instructions).
    """
    size = sum(n for _, n in pairs)
    ratio = sum(x for x, _ in pairs) / size
    return [(x - ratio * n) / size for x, n in pairs]


def influence_stderr(values: list[float]) -> float | None:
    """Standard error of a statistic from the influences of independent documents; None for a single one."""
    if len(values) < 2:
        return None
    return math.sqrt(len(values) / (len(values) - 1) * sum(value**2 for value in values))
