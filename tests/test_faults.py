"""A small part of the fault campaign. `make faults` runs all of it."""

from pathlib import Path

import pytest

from faults.campaign import Case, is_good, run_campaign, table
from faults.proxy import FaultProxy


@pytest.mark.slow
def test_a_few_faults_of_different_kinds(tmp_path: Path) -> None:
    cases = run_campaign(tmp_path, seed=7, scale=0.01, most=4)
    assert len({case.kind for case in cases}) == 4
    assert [case for case in cases if not is_good(case)] == []


def test_the_proxy_spoils_the_share_it_is_told_to() -> None:
    proxy = FaultProxy("http://127.0.0.1:9", seed=3)
    try:
        assert {proxy.next_fault() for _ in range(100)} == {""}
        proxy.spoil(0.3, "slow", "reset")
        drawn = [proxy.next_fault() for _ in range(1000)]
        assert 250 < sum(map(bool, drawn)) < 350
        assert set(drawn) == {"", "slow", "reset"}
    finally:
        proxy.close()


def test_the_table_counts_what_went_wrong() -> None:
    good, bad = Case("killed", outcome="identical"), Case("killed", outcome="identical", problems=["lost a step"])
    refused = Case("damaged", outcome="refused", said="error: is damaged", faults=3)
    lines = table([good, bad, refused]).splitlines()
    assert lines[2:] == [
        "| damaged | 1 | 3 | 0 | 1 | 0 |",
        "| killed | 2 | 2 | 1 | 0 | 1 |",
        "| **all** | 3 | 5 | 1 | 1 | 1 |",
    ]
