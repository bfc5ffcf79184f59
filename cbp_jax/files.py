"""Files that are whole at every moment, and a lock on a folder."""

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
    """Where a file is written before it is moved to its place; of one name, so that the next save clears a kill's."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, *pieces: bytes | memoryview) -> None:
    """Writes a file, all or nothing.

    It is written beside its place and then moved there: whoever reads it finds the last content or this.

    Args:
      path: of the file.
      *pieces: its content, one after the other.

    Raises:
      OSError: the file cannot be written; the one that was there is as it was.

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
            os.fsync(file.fileno())  # some disks tell only now that they are full
        os.replace(partial(path), path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"{path} cannot be written: {os.strerror(error.errno).lower()}, and it takes {sum(map(len, pieces)):,} "
            "bytes. What was saved last is still there; free some space and run again to go on",
        ) from error
    finally:
        partial(path).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder, which is made if it is not there, from other processes that ask for it in the same way.

    The operating system holds the lock, so that a process that is killed leaves none. A file system that knows no locks
    gives none, and neither does Windows.

    Args:
      folder: the folder.

    Raises:
      BlockingIOError: another process, or another part of this one, holds it.
      NotADirectoryError: it is a file.

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
            stack.enter_context(_locked_file(folder))
        yield


@contextlib.contextmanager
def _locked_file(folder: Path) -> Iterator[None]:
    path = folder / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError as error:
            if error.errno in _BUSY:
                os.close(descriptor)
                raise BlockingIOError(
                    error.errno, f"{folder} is in use by another run; wait for its end, or choose another folder"
                ) from None
            held = False
        # Whoever held the lock before removes the file; a lock on what is removed keeps nobody out.
        if not held or _is_at(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
