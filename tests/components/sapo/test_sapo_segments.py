"""Segments and splices against hand-worked cases and, for arbitrary lengths, against the invariants of Eqs. 4 and 5."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.sapo.segments import Segment, choose_segment, splice

END = 9
STOP = frozenset({END})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_starts_cover_exactly_those_that_leave_a_whole_segment():
    drawn = {choose_segment(10, 4, rng(seed)) for seed in range(200)}
    assert drawn == {Segment(start, start + 4) for start in range(7)}  # 0 .. 10 - 4


def test_starts_are_uniform():
    starts = [choose_segment(10, 4, rng(seed)).start for seed in range(7000)]
    assert all(850 < count < 1150 for count in np.bincount(starts))  # 1000 each, sd 29


def test_anywhere_may_start_at_any_token_and_is_shorter_near_the_end():
    drawn = {choose_segment(5, 3, rng(seed), start="anywhere") for seed in range(200)}
    assert drawn == {Segment(0, 3), Segment(1, 4), Segment(2, 5), Segment(3, 5), Segment(4, 5)}


def test_response_shorter_than_the_segment_is_all_b():
    assert choose_segment(3, 256, rng()) == Segment(0, 3)


def test_no_segment_regenerates_everything():
    assert choose_segment(700, None, rng()) == Segment(0, 700)


@pytest.mark.parametrize(("length", "segment"), [(0, 4), (5, 0)])
def test_nothing_to_regenerate_is_refused(length, segment):
    with pytest.raises(ValueError, match="must be at least 1"):
        choose_segment(length, segment, rng())


#     response      B       B'          y-                 span of B'  C kept
CASES = [
    ([1, 2, 3, 4, END], (1, 3), [7, 8], [1, 7, 8, 4, END], (1, 3), True),  # same length
    ([1, 2, 3, 4, END], (1, 3), [7], [1, 7, 4, END], (1, 2), True),  # shorter
    ([1, 2, 3, 4, END], (1, 3), [7, 8, 6], [1, 7, 8, 6, 4, END], (1, 4), True),  # longer
    ([1, 2, 3, 4, END], (0, 2), [7], [7, 3, 4, END], (0, 1), True),  # A empty
    ([1, 2, 3, 4, END], (3, 5), [7, END], [1, 2, 3, 7, END], (3, 5), False),  # C empty, B' ends
    ([1, 2, 3, 4, END], (3, 5), [7, 8], [1, 2, 3, 7, 8], (3, 5), False),  # C empty, B' does not end
    ([1, 2, 3, 4, END], (1, 3), [7, END], [1, 7, END], (1, 3), False),  # B' ends: C is dropped
    ([1, 2, 3, 4, END], (1, 3), [END], [1, END], (1, 2), False),  # B' ends at once
    ([1, 2, 3, 4, END], (1, 3), [7, END, 5], [1, 7, END], (1, 3), False),  # nothing counts after the end
    ([1, 2, 3, 4, END], (1, 3), [], [1, 4, END], (1, 1), True),  # empty B'
]


@pytest.mark.parametrize(("response", "b", "b_prime", "ids", "span", "c_kept"), CASES)
def test_splice_truncates_at_the_end_of_turn(response, b, b_prime, ids, span, c_kept):
    rejected = splice(response, Segment(*b), b_prime, STOP, max_length=100)
    assert (rejected.ids, (rejected.start, rejected.end), rejected.c_kept) == (ids, span, c_kept)


@pytest.mark.parametrize(
    ("b", "b_prime", "ids", "c_kept"),
    [
        ((1, 3), [7, END], [1, 7, 4, END], True),  # the end token goes, C stays
        ((1, 3), [END], [1, 4, END], True),
        ((3, 5), [7, END], [1, 2, 3, 7, END], False),  # no C to keep: the response ends here
    ],
)
def test_splice_keeps_the_tail_when_told_to(b, b_prime, ids, c_kept):
    rejected = splice([1, 2, 3, 4, END], Segment(*b), b_prime, STOP, 100, on_eos="keep_tail")
    assert (rejected.ids, rejected.c_kept) == (ids, c_kept)


def test_any_stop_token_ends_the_response():
    rejected = splice([1, 2, 3, END], Segment(1, 2), [7, 8], frozenset({END, 7}), 100)
    assert rejected.ids == [1, 7]


def test_window_cuts_from_the_end():
    rejected = splice([1, 2, 3, 4, END], Segment(1, 3), [7, 8, 6], STOP, max_length=3)
    assert (rejected.ids, rejected.start, rejected.end) == ([1, 7, 8], 1, 3)


@given(
    length=st.integers(1, 60),
    segment_length=st.one_of(st.none(), st.integers(1, 80)),
    anywhere=st.booleans(),
    b_prime=st.lists(st.integers(1, END), max_size=80),
    on_eos=st.sampled_from(["truncate", "keep_tail"]),
    max_length=st.integers(1, 150),
    seed=st.integers(0, 1000),
)
def test_invariants_of_a_pair(length, segment_length, anywhere, b_prime, on_eos, max_length, seed):
    chosen = [int(t) for t in rng(seed).integers(1, END, length - 1)] + [END]
    start = "anywhere" if anywhere else "whole"
    segment = choose_segment(length, segment_length, rng(seed), start)
    assert 0 <= segment.start < segment.end <= length
    if segment_length is not None and not anywhere:
        assert segment.end - segment.start == min(segment_length, length)

    rejected = splice(chosen, segment, b_prime, STOP, max_length, on_eos)
    assert len(rejected.ids) <= max_length
    shared = min(segment.start, max_length)
    assert rejected.ids[:shared] == chosen[:shared]  # A is untouched
    assert rejected.ids[rejected.start : rejected.end] == b_prime[: max(rejected.end - rejected.start, 0)]
    if rejected.c_kept:
        kept = rejected.ids[rejected.end :]
        assert kept == chosen[segment.end :][: len(kept)]
        assert END not in rejected.ids[rejected.start : rejected.end]
    else:
        assert END not in rejected.ids[:-1]  # the response is over at its first end token
