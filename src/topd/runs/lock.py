"""One writer for each run folder: a lock that says who holds it and ends with its process.

``RUN/.lock`` holds the owner's host, process id and start. Its owner keeps an ``flock`` on it,
which the system drops when the process ends, however that happens: what such a process leaves is
taken over. Not every shared file system passes an ``flock`` on to other hosts. So the owner also
touches the file every few seconds, and a lock from another host counts as left behind once it has
not been touched for a minute.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

from topd.distributed import agreed, everywhere, rank, several
from topd.errors import TOPDError
from topd.runs.files import LOCK, PATIENCE

BEAT = 5.0  # seconds between two touches


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), f"{datetime.now():%Y-%m-%d %H:%M:%S}")

    @classmethod
    def read(cls, content: bytes) -> Owner | None:
        """The owner that a lock names; None if it names none, as a moment after it was made."""
        try:
            found = json.loads(content)
            return cls(str(found["host"]), int(found["pid"]), str(found["started"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


@dataclass
class _Held:
    """A lock of this process, and how often it was asked for."""

    descriptor: int
    count: int = 1
    ended: Event = field(default_factory=Event)

    def touch(self) -> None:
        """Show that the owner lives, until it lets go."""
        while not self.ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self.descriptor)


_HELD: dict[str, _Held] = {}  # by real path


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold a run folder's lock; rank 0 does so for all ranks. A process may ask more than once.

    A folder that is new is removed if the run is refused before it recorded anything.

    Raises:
        TOPDError: another process writes there, or the folder cannot be written.
    """
    first = rank() == 0
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    agreed(lambda: _take(folder) if first else None)
    try:
        _check_shared(folder)
        yield
    except TOPDError as error:
        if first and made and error.exit_code == TOPDError.exit_code:
            _discard(folder)
        raise
    finally:
        if first:
            _release(folder, made)


def refuse_if_busy(folder: Path) -> None:
    """Raise TOPDError if another process writes there; where nobody does, nothing is changed.

    Several ranks find out together, in :func:`one_writer`.
    """
    if not several() and os.path.realpath(folder) not in _HELD:
        with suppress(FileNotFoundError), open(folder / LOCK, "r+b") as file:
            _check(folder, file.fileno())


def _check_shared(folder: Path) -> None:
    """Whether all ranks see the lock that rank 0 holds. Raises TOPDError on all."""
    if not several():
        return
    held, end = everywhere(_content(folder))[0], time.monotonic() + PATIENCE
    while (seen := _content(folder)) != held and time.monotonic() < end:  # NFS may show it later
        time.sleep(PATIENCE / 60)
    unseen = [number for number, same in enumerate(everywhere(seen == held)) if not same]
    if unseen:
        raise TOPDError(
            f"output_dir: rank {unseen[0]} does not see in {folder} what rank 0 writes there. "
            "Choose a folder on storage that all ranks see, by the same path."
        )


def _content(folder: Path) -> bytes:
    with suppress(OSError), open(folder / LOCK, "rb") as file:
        return file.read()
    return b""


def _take(folder: Path) -> None:
    place = os.path.realpath(folder)
    if place in _HELD:
        _HELD[place].count += 1
        return
    try:
        descriptor = _opened(folder)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Owner.this())).encode() + b"\n", 0)
    except OSError as error:
        raise TOPDError(
            f"output_dir: {folder} cannot be written ({error.strerror}). Choose another folder."
        ) from error
    held = _HELD[place] = _Held(descriptor)
    Thread(target=held.touch, daemon=True).start()


def _release(folder: Path, made: list[Path]) -> None:
    """Remove the lock, and new folders that are empty."""
    place = os.path.realpath(folder)
    held = _HELD[place]
    held.count -= 1
    if held.count:
        return
    del _HELD[place]
    held.ended.set()
    with suppress(FileNotFoundError):
        (folder / LOCK).unlink()
    os.close(held.descriptor)
    for path in made:
        with suppress(OSError):  # not empty
            path.rmdir()


def _discard(folder: Path) -> None:
    """Empty a new folder of a run that was refused before it, or one in it, recorded anything."""
    if any(path.stat().st_size for path in folder.rglob("*.jsonl")):
        return
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _opened(folder: Path) -> int:
    """The lock's file, locked; made with its folder if need be."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the owner before removed a folder that it had left empty
            continue
        try:
            _check(folder, descriptor)
        except TOPDError:
            os.close(descriptor)
            raise
        if _has_its_name(folder / LOCK, descriptor):
            return descriptor
        os.close(descriptor)  # the owner before removed it meanwhile


def _check(folder: Path, descriptor: int) -> None:
    """Have the flock of an open lock. Raises TOPDError if its owner lives."""
    here, locked = Owner.this(), True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(folder, Owner.read(os.pread(descriptor, 4096, 0))) from None
    except OSError:  # a file system that has none
        locked = False
    owner = Owner.read(os.pread(descriptor, 4096, 0))
    if owner is None or (owner.host, owner.pid) == (here.host, here.pid):
        return
    elsewhere = owner.host != here.host
    if _is_touched(folder / LOCK) if elsewhere else not locked and _runs(owner.pid):
        raise _busy(folder, owner)


def _is_touched(path: Path) -> bool:
    """Whether somebody touches a lock. Watches for a minute where nobody does."""
    before, end = _touched(path), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if _touched(path) != before:
            return True
    return False


def _touched(path: Path) -> int:
    with suppress(FileNotFoundError), open(path, "rb") as file:  # opened: NFS asks the server then
        return os.fstat(file.fileno()).st_mtime_ns
    return 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _has_its_name(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _busy(folder: Path, owner: Owner | None) -> TOPDError:
    who = f"process {owner.pid} on {owner.host}, since {owner.started}" if owner else "a process"
    return TOPDError(
        f"output_dir: another run is writing to {folder} ({who}). Wait for it, stop it, or choose "
        f"another folder. If you are sure that it has ended, remove {folder / LOCK}."
    )
