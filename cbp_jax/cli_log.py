"""Logs that other programs can read during a run."""

import datetime
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

JSON_LINES = "log.jsonl"
TENSORBOARD = "tensorboard"


class JsonLines:
    """Writes a line of JSON for each finished task of each method: time, method, task, and mean measurements.

    A lane that diverges gets a line too, with method, task and seed. Lines are appended: a resumed run continues the
    file, and repeated tasks are written again.

    Args:
      folder: the folder of the run.
    """

    def __init__(self, folder: Path):
        self._path = Path(folder) / JSON_LINES

    def task_done(self, method: str, task: int, means: dict[str, float]) -> None:
        """Write the means of a finished task; `task` counts from 0. Non-finite values become null."""
        numbers = {name: value if math.isfinite(value) else None for name, value in means.items()}
        self._write({"method": method, "task": task, **numbers})

    def diverged(self, method: str, seed: int, task: int) -> None:
        """Write that a lane diverged."""
        self._write({"method": method, "task": task, "seed": seed, "diverged": True})

    def _write(self, entry: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        with self._path.open("a") as file:
            file.write(json.dumps({"time": now, **entry}) + "\n")


class Tensorboard:
    """Writes scalars for TensorBoard, one run for each method. Requires tensorboardX.

    Args:
      folder: the folder of the run.

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path):
        try:
            import tensorboardX
        except ImportError as error:
            message = '--log tensorboard needs tensorboardX: pip install "cbp-jax[tensorboard]"'
            raise ImportError(message) from error
        self._make = lambda method: tensorboardX.SummaryWriter(str(Path(folder) / TENSORBOARD / _file_name(method)))
        self._writers: dict[str, Any] = {}

    def task_done(self, method: str, task: int, means: dict[str, float]) -> None:
        """Write the means of a finished task as scalars; `task` counts from 0."""
        writer = self._writers.get(method) or self._writers.setdefault(method, self._make(method))
        for name, value in means.items():
            writer.add_scalar(name, value, task)
        writer.flush()

    def diverged(self, method: str, seed: int, task: int) -> None:
        """Do nothing, since divergence is not a scalar."""


LOGS: dict[str, Callable[[Path], Any]] = {"jsonl": JsonLines, "tensorboard": Tensorboard}


class Logged:
    """Forwards all calls to logs, and then to a progress bar.

    Args:
      bar: a `cli_progress.Bar`.
      logs: objects with `task_done` and `diverged`.
    """

    def __init__(self, bar: Any, logs: Iterable[Any]):
        self._bar, self._logs = bar, list(logs)

    def __call__(self, methods: str, lanes: int, measures: dict[str, float]) -> None:
        """See `cli_progress.Bar`."""
        self._bar(methods, lanes, measures)

    def task_done(self, method: str, task: int, means: dict[str, float]) -> None:
        """See `JsonLines`."""
        for log in self._logs:
            log.task_done(method, task, means)

    def diverged(self, method: str, seed: int, task: int) -> None:
        """See `JsonLines`."""
        for log in [*self._logs, self._bar]:
            log.diverged(method, seed, task)

    def note(self, text: str) -> None:
        """See `cli_progress.Bar`."""
        self._bar.note(text)


def _file_name(label: str) -> str:
    return "".join(each if each.isalnum() or each in "+-._=" else "_" for each in label).strip("_")
