"""Keeps the state of a run on disk, so that one that is killed goes on where it was."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import serialization

_MOST_OF_THE_TIME = 20  # an interval between two saves is at least so many times what a save takes


class Checkpoint:
    """The state of lanes after some task, in one file that is whole at every moment.

    Args:
      path: the file.
      name: what runs, such as the labels of the methods; a file of another name is not read.
      every: seconds between two saves.
      before: called before each save, to bring to disk what has been recorded of the tasks that are done: results on
        disk are then never behind the state.

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

    def __init__(self, path: Path, name: str, every: float = 30.0, before: Callable[[], Any] = lambda: None):
        self.path, self.name, self.every, self.before = Path(path), name, every, before
        self._partial = self.path.with_name(f".{self.path.name}.part")
        self.tasks = 0  # done by the state that `restore` gives
        self._state: Any = None
        self._saved = time.monotonic()
        if self.path.is_file():
            found = serialization.msgpack_restore(self.path.read_bytes())
            if found["name"] == name:
                self.tasks, self._state = int(found["tasks"]), found["state"]

    def restore(self, like: Any) -> Any:
        """The saved state, or `like`, a state of the same structure, where there is none.

        Raises:
          ValueError: the file holds a state of another structure or of other shapes.
        """
        if self._state is None:
            return like
        state, self._state = serialization.from_state_dict(like, self._state), None
        for (key_path, found), expected in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(like), strict=True
        ):
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise ValueError(
                    f"{self.path} is of another run: {jax.tree_util.keystr(key_path)} is {found.dtype}"
                    f"{list(found.shape)} there, and {expected.dtype}{list(expected.shape)} here; delete the file"
                )
        return state

    def save(self, tasks: int, state: Callable[[], Any], now: bool = False) -> None:
        """Writes the state after so many tasks, if it is time.

        Args:
          tasks: how many tasks are done.
          state: gives the state, arrays on the host; called where it is time.
          now: whether it is time, whenever the last save was.
        """
        start = time.monotonic()
        if not now and start - self._saved < self.every:
            return
        self.before()
        content = {"name": self.name, "tasks": tasks, "state": serialization.to_state_dict(jax.device_get(state()))}
        try:
            self._partial.write_bytes(serialization.msgpack_serialize(content))
            os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)
        self._saved = time.monotonic()
        self.every = max(self.every, _MOST_OF_THE_TIME * (self._saved - start) if self.every else 0.0)

    def delete(self) -> None:
        """Removes the file, and what a save that was killed has left: what ran is done."""
        self.path.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)
