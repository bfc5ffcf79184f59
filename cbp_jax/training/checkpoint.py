"""Saves the state of a run, so that a killed run can resume."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import serialization

from cbp_jax import files
from cbp_jax.stops import Stops

_HEAD = b"cbp_jax state 1\n"  # then the checksum of what follows
_MOST_OF_THE_TIME = 20  # the interval between saves is at least this many times the duration of a save


Lane = tuple[str, int]  # label of the method, seed


class Saved(NamedTuple):
    """What a file of a `Checkpoint` holds.

    Attributes:
      path: the path of the file.
      name: what ran.
      tasks: how many tasks were done.
      needs: the checksum of the files without which the state is useless.
      state: the state of the lanes, as `flax.serialization.to_state_dict` returns it; None if nothing is left to do.
      lanes: the rows of the state; None where the file does not tell.
    """

    path: Path
    name: str
    tasks: int
    needs: bytes
    state: Any
    lanes: tuple[Lane, ...] | None = None


def read_state(path: Path) -> Saved | None:
    """Read the file of a `Checkpoint`; None where there is none.

    Raises:
      ValueError: the file is damaged, or no state, or one that an earlier version wrote without a checksum.
    """
    try:
        content = memoryview(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    checksum, body = content[len(_HEAD) :][:32], content[len(_HEAD) + 32 :]
    if content[: len(_HEAD)] != _HEAD:
        raise unusable(path, "it is damaged, or no state of a run, or was written by an earlier version")
    if hashlib.sha256(body).digest() != checksum:
        raise unusable(path, "it is damaged, as its checksum shows")
    found = serialization.msgpack_restore(body)  # type: ignore[arg-type]  # reads a memoryview without a copy
    lanes = tuple((label, int(seed)) for label, seed in found["lanes"]) if "lanes" in found else None
    return Saved(Path(path), found["name"], found["tasks"], found["needs"], found["state"], lanes)


def unusable(path: Path, reason: str) -> ValueError:
    """Return an error that says that a state cannot be used, and what to do."""
    return ValueError(
        f"the run cannot resume from {path}: {reason}. The results that were saved are safe. Delete the file "
        "and run again: what is not finished restarts from its first task, with the same results"
    )


class Checkpoint:
    """The state of all lanes after some task, in one file that is written atomically.

    Args:
      path: the file.
      name: identifies the run, such as the labels of the methods. A file with another name is not read.
      every: seconds between saves.
      before: called before each save, to write the recorded results of finished tasks to disk. Results on disk are then
        never older than the state.
      needs: takes a number of tasks and returns a checksum of files without which the state is useless, such as their
        results.
      lanes: method and seed of each row of the state; kept in the file.
      found: the state to resume from, in place of the one in the file; it is not checked.
      stops: holds back Ctrl-C and SIGTERM until the next save, which such a stop makes due at once.

    Raises:
      ValueError: the file is damaged, is not a state, or was written by an earlier version without a checksum; or the
        files that it needs have changed.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> path = Path(tempfile.mkdtemp()) / "state.msgpack"
      >>> first = Checkpoint(path, "bp", every=0.0)
      >>> first.tasks
      0
      >>> first.save(3, lambda: {"w": jnp.ones(2)})
      >>> again = Checkpoint(path, "bp")
      >>> again.tasks, again.restore({"w": jnp.zeros(2)})["w"].tolist()
      (3, [1.0, 1.0])
    """

    def __init__(
        self,
        path: Path,
        name: str,
        every: float = 30.0,
        before: Callable[[], Any] = lambda: None,
        needs: Callable[[int], bytes] = lambda tasks: b"",
        lanes: Sequence[Lane] | None = None,
        found: Saved | None = None,
        stops: Stops | None = None,
    ):
        self.path, self.name, self.every, self.before, self.needs = Path(path), name, every, before, needs
        self.lanes = None if lanes is None else tuple(lanes)
        self.stops = Stops() if stops is None else stops
        self.tasks = 0  # finished in the state that `restore` returns
        self._state: Any = None
        self._saved = time.monotonic()
        if found is None and (found := read_state(self.path)) is not None:
            if found.name != name:
                found = None
            elif found.needs != needs(found.tasks):
                raise unusable(self.path, f"the results next to it are not those of its {found.tasks} tasks")
        if found is not None:
            self.tasks, self._state = found.tasks, found.state

    def restore(self, like: Any) -> Any:
        """Return the saved state, or `like`, a state of the same structure, if there is none.

        Raises:
          ValueError: the file holds a state of another structure or of other shapes.
        """
        if self._state is None:
            return like
        try:
            state, self._state = serialization.from_state_dict(like, self._state), None
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # the type depends on the kind of difference
            raise unusable(self.path, f"it is of another run: {error}") from error
        for (key_path, found), expected in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(like), strict=True
        ):
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise unusable(
                    self.path,
                    f"it is of another run: {jax.tree_util.keystr(key_path)} is {found.dtype}{list(found.shape)} "
                    f"there, and {expected.dtype}{list(expected.shape)} here",
                )
        return state

    def save(self, tasks: int, state: Callable[[], Any], now: bool = False) -> None:
        """Write the state, if the time since the last save is long enough, or a stop waits for it.

        Args:
          tasks: number of finished tasks.
          state: a function that returns the state, as arrays on the host. Called only if the state is written.
          now: whether to write regardless of the last save.
        """
        start = time.monotonic()
        if not now and not self.stops.asked and start - self._saved < self.every:
            self.stops.hold()
            return
        self.before()
        self._write(tasks, self.needs(tasks), serialization.to_state_dict(jax.device_get(state())))
        self._saved = time.monotonic()
        self.every = max(self.every, _MOST_OF_THE_TIME * (self._saved - start) if self.every else 0.0)
        self.stops.release()

    def close(self, tasks: int) -> None:
        """Leave a note in place of the state: all tasks are done, and no older state of these lanes is needed."""
        self.before()
        self._write(tasks, self.needs(tasks), None)

    def _write(self, tasks: int, needs: bytes, state: Any) -> None:
        content = {"name": self.name, "tasks": tasks, "needs": needs, "state": state}
        if self.lanes is not None:
            content["lanes"] = [list(lane) for lane in self.lanes]
        body = serialization.msgpack_serialize(content)
        files.write_whole(self.path, _HEAD, hashlib.sha256(body).digest(), body)

    def delete(self) -> None:
        """Remove the file, and leftovers of killed saves, after the run has finished."""
        self.path.unlink(missing_ok=True)
        files.partial(self.path).unlink(missing_ok=True)
