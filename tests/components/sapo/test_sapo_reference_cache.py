"""Reference log-probs are found again for the same entry and version of the reference, and only then."""

import pytest
import torch

from components.sapo.reference import ReferenceCache


def logps(*entries: int) -> torch.Tensor:
    """Distinct values: chosen -id, rejected -id - 0.5."""
    ids = torch.tensor(entries, dtype=torch.float32)
    return torch.stack([-ids, -ids - 0.5])


@pytest.fixture
def cache() -> ReferenceCache:
    cache = ReferenceCache(4)
    cache.store([3, 5], logps(3, 5))
    return cache


def test_stored_values_come_back_in_the_order_asked(cache):
    assert torch.equal(cache.get([5, 3, 5]), logps(5, 3, 5))


def test_each_missing_id_is_named_once(cache):
    assert cache.missing([9, 5, 2, 9, 3]) == [9, 2]
    with pytest.raises(KeyError, match="2"):
        cache.get([3, 2])


def test_an_entry_that_took_anothers_slot_is_not_that_entry(cache):
    assert cache.missing([7]) == [7]  # 7 and 3 share a slot
    cache.store([7], logps(7))
    assert cache.missing([3]) == [3]
    assert torch.equal(cache.get([7]), logps(7))


def test_a_refreshed_reference_knows_nothing(cache):
    cache.version += 1
    assert cache.missing([3, 5]) == [3, 5]


def test_state_comes_back(cache):
    cache.version = 2
    cache.store([6], logps(6))
    twin = ReferenceCache(4)
    twin.load_state_dict(cache.state_dict())
    assert twin.version == 2
    assert torch.equal(twin.get([6]), logps(6))
    assert twin.missing([3, 5]) == [3, 5]
