"""One writer for an output in a bucket: an object `.run.json` that says whose it is and is renewed while that one lives.

It is taken with conditional writes, so of two that start at once one gets it. A process that was killed renews it no more:
the next one waits that long, then takes over. It stays until the output is complete, and marks it as unfinished.
"""

import json
import logging
import os
import random
import signal
import socket
import threading
import time
import uuid
from typing import Any

from components.common.core.errors import UserError
from components.common.core.identity import refuse_other_run
from components.common.storage.client import Location, code_of, connect, explained
from components.common.storage.transfer import RUN, objects, read_object

logger = logging.getLogger(__name__)


class Lease:
    """The right to write below a prefix.

    Args:
        place: the prefix.
        run: stage, digest and identity of the run; another run's unfinished output is refused.
        seconds: after so long without renewal the right is free. 0 or less is refused by the settings.
    """

    def __init__(self, place: Location, run: dict[str, Any], seconds: float) -> None:
        self.place = place
        self.run = run
        self.seconds = seconds
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.etag = ""
        self.lost = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self, overwrite: bool = False) -> None:
        """Takes the lease; waits for a silent owner's to end.

        Raises:
            UserError: another process renews it, the prefix holds another run or files of other origin.
        """
        content, etag = self._read()
        if not content and not overwrite and (there := sorted(objects(self.place).keys() - {RUN})):
            what = f"{there[0]} and others" if len(there) > 1 else there[0]
            raise UserError(
                f"--output {self.place}: is not empty ({what}); give another place, or --overwrite to replace it"
            )
        if content and not overwrite:
            refuse_other_run(f"--output {self.place}", content.get("identity"), self.run["identity"])
        if content and content.get("owner"):
            etag = self._outwait(content["owner"], etag)
        self.etag = self._put({"IfMatch": etag} if etag else {"IfNoneMatch": "*"})
        self._thread.start()

    def _read(self) -> tuple[dict[str, Any], str]:
        """What the object says, and its ETag; empty where there is none."""
        found = read_object(self.place, RUN)
        return ({}, "") if found is None else (json.loads(found[0]), found[1])

    def _outwait(self, owner: str, etag: str) -> str:
        """The ETag of a lease that its owner has not renewed for `seconds`; raises UserError when it does."""
        logger.info("%s: %s was at work there; waiting up to %.0f s for a sign of it", self.place, owner, self.seconds)
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.seconds / 8))
            content, now = self._read()
            if not content or not content.get("owner"):
                return now
            if now != etag:
                raise self._taken(content["owner"])
        return etag

    def _taken(self, owner: str) -> UserError:
        return UserError(f"--output {self.place}: {owner} is writing there now; let it end, or give another place")

    def _put(self, conditions: dict[str, str], owner: str | None = "") -> str:
        """Writes the object as this process's; raises UserError when another was faster."""
        from botocore.exceptions import ClientError

        content = {**self.run, "owner": self.owner if owner == "" else owner, "renewed": uuid.uuid4().hex}
        with explained(self.place):
            try:
                return _put_if(self.place, content, conditions)
            except ClientError as error:
                if code_of(error) not in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                    raise
        content, etag = self._read()  # was it this process, whose answer got lost?
        if content.get("owner") == self.owner:
            return etag
        raise self._taken(str(content.get("owner")))

    def _renew(self) -> None:
        while not self._stopped.wait(self.seconds / 4 * random.uniform(0.8, 1.0)):
            try:
                self.etag = self._put({"IfMatch": self.etag} if self.etag else {})
            except UserError as error:
                if "is writing there now" not in str(error):
                    continue  # the store is away; it is tried again
                logger.error("%s", error)
                self.lost.set()
                os.kill(os.getpid(), signal.SIGTERM)  # the stage stops as if it were pre-empted
                return

    def check(self) -> None:
        """Raises UserError when another process has taken over."""
        if self.lost.is_set():
            raise UserError(f"--output {self.place}: another process has taken over; nothing more is written there")

    def release(self) -> None:
        """Lets the next process take over at once; the output stays marked as unfinished."""
        self._stop()
        if not self.lost.is_set():
            try:
                self._put({"IfMatch": self.etag}, owner=None)
            except UserError as error:
                logger.warning("%s", error)

    def end(self) -> None:
        """Removes the mark: the output is complete."""
        self._stop()
        with explained(self.place):
            connect().delete_object(Bucket=self.place.bucket, Key=self.place.prefix + RUN)

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()


def _put_if(place: Location, content: dict[str, Any], conditions: dict[str, str]) -> str:
    """A conditional write; a plain one where the store knows no conditions."""
    from botocore.exceptions import ClientError

    body = json.dumps(content).encode()
    target = {"Bucket": place.bucket, "Key": place.prefix + RUN, "Body": body}
    try:
        return connect().put_object(**target, **conditions)["ETag"]
    except ClientError as error:
        if code_of(error) != "NotImplemented":
            raise
        return connect().put_object(**target)["ETag"]
