"""Segments of a response (paper section 3, Eqs. 4 and 5): y+ = A B C is cut, B is regenerated as B', and y- = A B' C.

All positions count response tokens: B is `response[start:end]`. A response ends with one end-of-turn token unless the window
cut it, so C, or B where C is empty, holds that token.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

OnEos = Literal["truncate", "keep_tail"]
SegmentStart = Literal["whole", "anywhere"]


@dataclass(frozen=True)
class Segment:
    """B = response[start:end]."""

    start: int
    end: int


@dataclass(frozen=True)
class Rejected:
    """y- as token ids, with B' at [start, end) of it, and whether C followed."""

    ids: list[int]
    start: int
    end: int
    c_kept: bool


def choose_segment(
    response_length: int, segment_length: int | None, generator: np.random.Generator, start: SegmentStart = "whole"
) -> Segment:
    """Draws B.

    Args:
        response_length: tokens of y+, at least 1.
        segment_length: tokens of B (the paper's N_seg), or None for all of the response (the "no segment" ablation).
        generator: the only source of randomness.
        start: "whole" draws among the starts that leave a whole segment, so a response shorter than one is all B (as the
            authors' code does); "anywhere" draws among all tokens, so B may be shorter near the end.

    Raises:
        ValueError: there is no token to regenerate, or a segment of no tokens is asked for.
    """
    if response_length < 1:
        raise ValueError(f"response_length = {response_length}: must be at least 1")
    if segment_length is None:
        return Segment(0, response_length)
    if segment_length < 1:
        raise ValueError(f"segment_length = {segment_length}: must be at least 1")
    last = response_length - 1 if start == "anywhere" else max(response_length - segment_length, 0)
    first_of_b = int(generator.integers(0, last + 1))
    return Segment(first_of_b, min(first_of_b + segment_length, response_length))


def splice(
    response: list[int],
    segment: Segment,
    replacement: list[int],
    stop_ids: frozenset[int],
    max_length: int,
    on_eos: OnEos = "truncate",
) -> Rejected:
    """Puts B' in the place of B.

    Args:
        response: y+ as token ids, (length,).
        segment: B.
        replacement: B' as the sampler gave it; it may hold a stop token, after which nothing of B' counts.
        stop_ids: tokens that end a turn.
        max_length: most tokens y- may have (the window less the prompt); what exceeds it is cut from the end.
        on_eos: "truncate" ends the response at a stop token inside B' and drops C; "keep_tail" drops the stop token and
            keeps C. Where C is empty both keep the stop token: the response ends there anyway.
    """
    a, c = response[: segment.start], response[segment.end :]
    stop = next((i for i, token in enumerate(replacement) if token in stop_ids), None)
    c_kept = bool(c) and (stop is None or on_eos == "keep_tail")
    if stop is not None:
        replacement = replacement[: stop if c_kept else stop + 1]
    ids = a + replacement + (c if c_kept else [])
    return Rejected(ids[:max_length], len(a), min(len(a) + len(replacement), max_length), c_kept)
