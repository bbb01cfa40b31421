"""One run at a time in a run folder. Input: the folder. Output: lock/00000001.json …, the newest says who runs.

A run creates the file with the next number, which of several only one can, and beats by writing that file again, with
how far it is; the last time with how it ended. It has lost the lock where a higher number is there, and a file that
was let go or no longer beats may be followed by the next. So it takes nothing but a create that fails where a file is:
local disks, S3 and GCS have one. No clock is compared with another machine's. Without a lock nothing is corrupted
either: what is written under a name is always the same bytes.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenclean_ray.errors import UserError, redact
from tokenclean_ray.layout import GOES_ON, Store
from tokenclean_ray.progress import at_work, say
from tokenclean_ray.storage import failure, failures

HEARTBEAT_S = 5.0
LEASE_S = 60.0  # without a beat: a run that cannot reach its store for so long is taken for dead
POLL_S = 0.5
FOLDER = "lock"
WAKE = signal.SIGUSR1  # not SIGINT: a shell starts what it puts in the background with that ignored


class Lock:
    """What a run holds while it works in a folder."""

    def __init__(self, store: Store, number: int, record: dict[str, Any]) -> None:
        """`number` and `record`: of the file that this run created."""
        self._store, self._number, self._record = store, number, record
        self._ended = threading.Event()
        self._main = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self.lost: UserError | None = None

    def check(self) -> None:
        """Raise `UserError` where another run has taken over; called before anything is published."""
        newest = max(_numbers(self._store), default=0)
        if newest > self._number:
            holder = self._store.read_json(_file(newest)) or self._record
            self.lost = UserError(
                f"this run stopped beating for {LEASE_S:.0f} s, and {_who(holder)} took over {self._store.url}: "
                "wait for that run, or end it and run the same command again"
            )
        if self.lost:
            raise self.lost

    def start(self) -> None:
        """Beat until `release`."""
        if self._main:
            self._before = signal.signal(WAKE, signal.default_int_handler)
        self._thread.start()

    def release(self, error: BaseException | None) -> None:
        """Let the next run in; `error`: what ended this one."""
        self._ended.set()
        self._thread.join()
        if self._main:
            signal.signal(WAKE, self._before)
        if not self.lost:
            with contextlib.suppress(*failures()):  # the next run then waits for the lease to end
                stopped = isinstance(error, KeyboardInterrupt | SystemExit)
                why = error and redact(str(error) if isinstance(error, UserError) else failure(error))
                last = {"released": True, "stage": at_work(), "stopped": stopped, "error": why}
                self._store.write_json(_file(self._number), self._record | last)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self.check()
                self._record |= {"beat": self._record["beat"] + 1, "stage": at_work()}
                self._store.write_json(_file(self._number), self._record)
            except UserError as lost:
                self.lost = lost
                if self._main:  # whatever the run is waiting for
                    signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
                return
            except failures():
                continue  # the store's own retries have ended; the lease outlasts several beats


@contextlib.contextmanager
def hold(store: Store, command: str) -> Iterator[Lock]:
    """Work in a run folder alone.

    Args:
        command: of this run, for those who find it there.

    Raises:
        UserError: another run is at work there, or took over from this one; storage that fails for good.
    """
    try:
        lock = _acquire(store, command)
        lock.start()
        try:
            yield lock
        finally:
            try:
                lock.release(sys.exception())
            finally:  # the signal may come while the lock is let go
                if lock.lost:
                    raise lock.lost
    except failures() as error:
        raise UserError(f"{failure(error)}; {GOES_ON}") from error


def _acquire(store: Store, command: str) -> Lock:
    record = {
        "command": f"tokenclean {command}",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": _machine(),
        "token": uuid.uuid4().hex,
        "beat": 0,
    }
    data = json.dumps(record).encode()
    while True:
        before = _numbers(store)
        number = before[-1] + 1 if before else 1
        if before:
            _await_end(store, _file(number - 1))
        if store.create_bytes(_file(number), data):
            break
    # some servers that speak S3 do not know the condition and replace what is there
    if not store.creates_atomically or store.create_bytes(_file(number), data + b"\n"):
        say(
            f"warning: {store.url} cannot create a file only where there is none, so two runs at once are not kept "
            "apart: start no second one"
        )
    for old in before:
        store.delete(_file(old))
    return Lock(store, number, record)


def _await_end(store: Store, file: str) -> None:
    """Return once the run that holds a lock has ended or died; raise `UserError` where it lives."""
    first, deadline, told = store.read_json(file) or {}, time.monotonic() + LEASE_S, False
    while (now := store.read_json(file)) and not now.get("released") and time.monotonic() < deadline:
        if _gone(now):
            return
        if now["beat"] != first.get("beat"):
            raise UserError(
                f"output {store.url} is in use by {_who(now)}: wait until it ends, stop it, or set another output"
            )
        if not told and time.monotonic() > deadline - LEASE_S + 2 * HEARTBEAT_S:
            told = True
            say(f"{_who(now)}, holds {store.url} and may be dead: waiting {LEASE_S:.0f} s for a sign of it")
        time.sleep(POLL_S)


def newest(store: Store) -> dict[str, Any] | None:
    """What the newest run in a folder says of itself; None where there was none."""
    numbers = _numbers(store)
    return store.read_json(_file(numbers[-1])) if numbers else None


def alive(store: Store, run: dict[str, Any]) -> bool:
    """Whether a run beats; waits for up to two beats."""
    deadline = time.monotonic() + 2 * HEARTBEAT_S
    while not run.get("released") and not _gone(run) and time.monotonic() < deadline:
        if (newest(store) or run) != run:
            return True
        time.sleep(POLL_S)
    return False


def _gone(holder: dict[str, Any]) -> bool:
    """Whether it is known to have died: a process of this machine that is not there."""
    return bool(holder["machine"]) and holder["machine"] == _machine() and not Path(f"/proc/{holder['pid']}").exists()


def _who(holder: dict[str, Any]) -> str:
    return f"{holder['command']} (process {holder['pid']} on {holder['host']}, since {holder['since']})"


def _numbers(store: Store) -> list[int]:
    names = (name.removesuffix(".json") for name in store.names(FOLDER))
    return sorted(int(name) for name in names if name.isdecimal())


def _file(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"


def _machine() -> str | None:
    """Processes that share it see each other under the same numbers; None where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
