"""Atomic writes of files, and a lock on a folder."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_BUSY = (errno.EAGAIN, errno.EACCES)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial(path: Path) -> Path:
    """Return the temporary path of a file, before it is moved to its place. It is always the same, so that the next
    save overwrites the leftover of a killed process."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file atomically.

    It is written to a temporary file next to it and then moved: readers find either the old content or the new.

    Args:
      path: path of the file.
      *pieces: its content, in pieces.

    Raises:
      OSError: the file cannot be written. An existing file is not changed.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "name"
      >>> write_whole(path, b"one ", b"whole")
      >>> path.read_bytes()
      b'one whole'
    """
    try:
        with partial(path).open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())  # some disks report only now that they are full
        os.replace(partial(path), path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"{path} cannot be written: {os.strerror(error.errno).lower()}, and it takes {sum(map(len, pieces)):,} "
            "bytes. What was saved last is still there; free some space and run again to resume",
        ) from error
    finally:
        partial(path).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Lock a folder against other processes that lock it the same way. The folder is created if needed.

    The operating system holds the lock, so a killed process leaves none behind. File systems without locks, and
    Windows, do not lock.

    Args:
      folder: the folder.
      shared: whether others may hold it at the same time, who ask for it as shared too.

    Raises:
      BlockingIOError: another process, or another part of this one, holds it.
      NotADirectoryError: the path is a file.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> with locked(folder), locked(folder):
      ...     pass
      Traceback (most recent call last):
      ...
      BlockingIOError: [Errno 11] ... is in use by another run; wait for its end, or choose another folder
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be a folder, and is a file")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            stack.enter_context(_locked_file(folder, shared))
        yield


@contextlib.contextmanager
def _locked_file(folder: Path, shared: bool) -> Iterator[None]:
    path = folder / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            held = True
        except OSError as error:
            if error.errno in _BUSY:
                os.close(descriptor)
                raise BlockingIOError(
                    error.errno, f"{folder} is in use by another run; wait for its end, or choose another folder"
                ) from None
            held = False
        # The previous holder of the lock removes the file, and a lock on a removed file locks nobody out.
        if not held or _is_at(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        if not shared or _is_the_last(descriptor):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_the_last(descriptor: int) -> bool:
    """Return whether nobody else shares a lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
