"""The buffer against hand-worked evictions and draw shares, and against a plain simulation."""

import tracemalloc

import numpy as np
import pytest

from components.sapo.replay_buffer import Entry, ReplayBuffer
from components.sapo.segments import Segment


def entry(row: int) -> Entry:
    return Entry(row, Segment(1, 3), np.array([row, 7], dtype=np.int32), step=row, version=0)


def filled(capacity: int, rows: int) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity)
    for row in range(rows):
        buffer.add([entry(row)])
    return buffer


def test_first_in_is_first_out():
    buffer = filled(capacity=3, rows=5)
    assert (len(buffer), buffer.added, buffer.evicted) == (3, 5, 2)
    drawn = {(i, e.row) for i, e in buffer.draw(200, np.random.default_rng(0))}
    assert drawn == {(2, 2), (3, 3), (4, 4)}  # ids keep counting; 0 and 1 are gone


def test_evicted_id_has_no_count():
    buffer = filled(capacity=3, rows=5)
    with pytest.raises(KeyError):
        buffer.count(1)


def test_a_draw_is_counted():
    buffer = filled(capacity=1, rows=1)
    buffer.draw(3, np.random.default_rng(0))
    assert buffer.count(0) == 3


def test_weights_are_one_over_count_plus_one():
    """Counts 0, 1, 3 give weights 1, 1/2, 1/4: shares 4/7, 2/7, 1/7."""
    buffer = filled(capacity=4, rows=3)
    state = buffer.state_dict()
    state["counts"] = np.array([0, 1, 3])
    shares = np.zeros(3)
    for seed in range(7000):  # one draw each from the same counts
        buffer.load_state_dict(state)
        shares[buffer.draw(1, np.random.default_rng(seed))[0][0]] += 1 / 7000
    np.testing.assert_allclose(shares, [4 / 7, 2 / 7, 1 / 7], atol=0.02)  # sd 0.006


def test_new_entry_starts_with_a_fresh_count():
    buffer = filled(capacity=2, rows=2)
    buffer.draw(50, np.random.default_rng(0))
    buffer.add([entry(2)])
    assert buffer.count(2) == 0


def test_use_evens_out():
    buffer = filled(capacity=64, rows=64)
    for step in range(100):
        buffer.draw(8, np.random.default_rng(step))
    counts = buffer.counts()
    assert counts.sum() == 800
    assert counts.std() < 2.5  # independent uniform draws would give sqrt(12.5) = 3.5


def test_matches_a_plain_simulation_of_fifo_and_inverse_frequency_draws():
    """The same uniform numbers through a list and a cumulative sum choose the same entries, step after step."""
    capacity, buffer, plain = 37, ReplayBuffer(37), []
    for step in range(120):
        for row in range(5):
            buffer.add([entry(5 * step + row)])
            plain = [*plain, [5 * step + row, 0]][-capacity:]
        drawn = [i for i, _ in buffer.draw(5, np.random.default_rng(step))]
        # The tree orders entries by slot (id modulo capacity), so the plain list is put in that order too.
        by_slot = sorted(plain, key=lambda e: e[0] % capacity)
        edges = np.cumsum([1 / (count + 1) for _, count in by_slot])
        numbers = np.random.default_rng(step).random(5) * edges[-1]
        expected = [by_slot[int(np.searchsorted(edges, number, side="right"))] for number in numbers]
        assert drawn == [e[0] for e in expected]
        for e in expected:
            e[1] += 1
    assert {i: buffer.count(i) for i, _ in plain} == dict(plain)


def test_state_round_trip_continues_identically():
    buffer = filled(capacity=8, rows=11)
    buffer.draw(20, np.random.default_rng(1))
    other = ReplayBuffer(8)
    other.load_state_dict(buffer.state_dict())
    for twin in (buffer, other):
        twin.add([entry(11)])
    first, second = (twin.draw(30, np.random.default_rng(2)) for twin in (buffer, other))
    assert [(i, e.row, e.replacement.tolist()) for i, e in first] == [
        (i, e.row, e.replacement.tolist()) for i, e in second
    ]
    assert buffer.counts().tolist() == other.counts().tolist()


def test_state_of_another_capacity_is_refused():
    with pytest.raises(ValueError, match="replay_buffer_size is 9, the saved buffer has 8"):
        ReplayBuffer(9).load_state_dict(ReplayBuffer(8).state_dict())


def test_drawing_from_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        ReplayBuffer(4).draw(1, np.random.default_rng(0))


@pytest.mark.parametrize("capacity", [1, 2, 3, 1000])
def test_draws_stay_within_what_is_held(capacity):
    buffer = filled(capacity, rows=max(1, capacity // 2))
    assert all(0 <= i < buffer.added for i, _ in buffer.draw(500, np.random.default_rng(3)))


@pytest.mark.parametrize("rows", [3, 8, 11])
def test_adding_many_at_once_is_adding_each(rows):
    together, apart = filled(capacity=5, rows=2), filled(capacity=5, rows=2)
    for buffer in (together, apart):
        buffer.draw(9, np.random.default_rng(0))
    ids = together.add([entry(2 + i) for i in range(rows)])
    assert ids == [apart.add([entry(2 + i)])[0] for i in range(rows)]
    assert together.counts().tolist() == apart.counts().tolist()
    drawn, expected = ([(i, e.row) for i, e in b.draw(50, np.random.default_rng(1))] for b in (together, apart))
    assert drawn == expected


def test_adding_nothing_changes_nothing():
    buffer = filled(capacity=5, rows=2)
    assert buffer.add([]) == []
    assert (len(buffer), buffer.added) == (2, 2)


@pytest.mark.slow
def test_a_million_entries_of_256_tokens_fit_in_two_and_a_half_gigabytes():
    """Measured on 4,000 entries as the sampler makes them; memory is linear in their number."""
    tracemalloc.start()
    buffer = ReplayBuffer(4_000)
    for row in range(4_000):
        segment = Segment(1000 + row, 1256 + row)
        buffer.add([Entry(10_000 + row, segment, np.zeros(256, dtype=np.int32), 1000 + row, 1000 + row)])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 4_000 < 2500
