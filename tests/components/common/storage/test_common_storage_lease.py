"""One writer for an output: who is first, who has gone silent, who has lost it."""

import json
import time
from typing import Any

import pytest

from components.common.core.errors import UserError
from components.common.core.identity import SCHEMA
from components.common.storage import lease as leases
from components.common.storage import transfer
from components.common.storage.client import Location, connect
from components.common.storage.lease import Lease
from faults.store import BUCKET


def run(**settings: object) -> dict[str, Any]:
    identity = {"schema": SCHEMA, "settings": settings, "contents": {}, "scope": {}, "versions": {}}
    return {"stage": "sapo", "run": "digest", "identity": identity}


MINE = run(beta=0.1, seed=42)
OTHER = run(beta=0.2, seed=1)


@pytest.fixture
def place(request: pytest.FixtureRequest, store) -> Location:
    return Location(BUCKET, f"lease/{request.node.originalname}")


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that a lease has sent to its own process."""
    sent: list[int] = []
    monkeypatch.setattr(leases.os, "kill", lambda process, number: sent.append(number))
    return sent


def test_a_living_owner_is_not_robbed(place):
    first = Lease(place, MINE, seconds=0.8)
    first.acquire()
    time.sleep(1.0)  # longer than a lease lasts without renewal
    with pytest.raises(UserError, match="is writing there now; let it end, or give another place"):
        Lease(place, MINE, seconds=0.8).acquire()
    first.check()
    first.end()
    assert transfer.objects(place) == {}


def test_a_released_lease_is_free_at_once(place):
    first = Lease(place, MINE, seconds=60)
    first.acquire()
    first.release()
    started = time.monotonic()
    second = Lease(place, MINE, seconds=60)
    second.acquire()
    assert time.monotonic() - started < 5
    second.end()


def test_a_silent_owner_loses_it_and_notices(place, killed):
    first = Lease(place, MINE, seconds=60)  # renews in a quarter of a minute: silent for this test
    first.acquire()
    second = Lease(place, MINE, seconds=1.0)
    second.acquire()
    first.seconds = 0.01
    first._renew()
    assert killed and first.lost.is_set()
    with pytest.raises(UserError, match="another process has taken over"):
        first.check()
    first.release()  # takes nothing back
    second.check()
    assert json.loads(transfer.read_object(place, transfer.RUN)[0])["owner"] == second.owner
    second.end()


def test_another_runs_output_is_refused_with_what_differs(place):
    Lease(place, MINE, seconds=60).acquire()
    with pytest.raises(UserError, match=r"of another run: beta was 0\.1, is 0\.2; seed was 42, is 1; give"):
        Lease(place, OTHER, seconds=1).acquire()


def test_other_peoples_files_are_refused(place):
    connect().put_object(Bucket=BUCKET, Key=f"{place.prefix}precious", Body=b"x")
    with pytest.raises(UserError, match=r"is not empty \(precious\); give another place, or --overwrite"):
        Lease(place, MINE, seconds=1).acquire()
    taken = Lease(place, MINE, seconds=1)
    taken.acquire(overwrite=True)
    taken.end()


def test_of_two_that_start_at_once_one_is_told_that_the_other_writes(place, monkeypatch):
    first, second = Lease(place, MINE, seconds=60), Lease(place, MINE, seconds=60)
    reads = iter([({}, "")])
    real = second._read
    monkeypatch.setattr(second, "_read", lambda: next(reads, None) or real())  # it looks before the first has written
    first.acquire()
    with pytest.raises(UserError, match=f"{first.owner} is writing there now"):
        second.acquire()
    first.end()


def test_a_lost_answer_is_not_taken_for_another_owner(place):
    first = Lease(place, MINE, seconds=60)
    first.acquire()
    etag = first.etag
    first._put({"IfMatch": etag})  # done, but its answer is lost
    first.etag = first._put({"IfMatch": etag})  # tried again with the old ETag
    assert not first.lost.is_set()
    first.end()
