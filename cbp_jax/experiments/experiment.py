"""What an experiment is: one object of one dataclass."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cbp_jax.experiments import stream
from cbp_jax.experiments.stream import Job, Progress
from cbp_jax.problems import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """An experiment: what is compared on which stream of tasks, and how it is shown.

    One on a stream of tasks needs its first five fields; `stream.StreamSettings` says what its settings are at least.
    It is run by name if it is a row of `EXPERIMENTS`, and by its import path from anywhere.

    Attributes:
      name: in commands and results.
      about: one line for lists.
      Settings: a frozen dataclass, whose fields are the options of the command line.
      presets: by name, functions that make settings: of a dataset's name or None, where `Settings` has `dataset`, else
        of nothing.
      problem: of the settings, the stream of tasks: a `problems.Problem`.
      network: of the settings, what `learners.make_learner` gets besides, such as settings of the network.
      train: of the settings, what takes the place of `training.run_tasks`.
      measures: of the settings, what `train` measures: names and their meanings.
      curves: of the settings, what `train` measures of a task at several points, by name: a `stream.Curve` each.
      check: of the settings, raises a ValueError where they are out of range, and returns the methods.
      total: of the settings, how many tasks all lanes have to do, for a progress bar.
      plot: draws the pictures of results: of these, a folder and formats as Matplotlib names them, the paths.
      summary: of results, their table.
      job: of the settings, what runs them, for what is no stream of tasks and has no `problem`.
    """

    name: str
    about: str
    Settings: type
    presets: Mapping[str, Callable[..., Any]]
    problem: Callable[[Any], Problem] | None = None
    network: Callable[[Any], Mapping[str, Any]] = lambda settings: {}
    train: Callable[[Any], Callable[..., Iterator[dict[str, Any]]]] | None = None
    measures: Callable[[Any], Mapping[str, str]] | None = None
    curves: Callable[[Any], Mapping[str, stream.Curve]] | None = None
    check: Callable[[Any], list[Any]] = stream.check
    total: Callable[[Any], int] = stream.total
    plot: Callable[..., list[Path]] = stream.plot
    summary: Callable[[Any], str] = stream.summary
    job: Callable[[Any], Job] | None = None

    @property
    def NAME(self) -> str:
        """`name`."""
        return self.name

    @property
    def PRESETS(self) -> Mapping[str, Callable[..., Any]]:
        """`presets`."""
        return self.presets

    def preset(self, name: str, dataset: str | None = None) -> Any:
        """The settings of a preset.

        Args:
          name: one of `presets`: "smoke" (seconds), "laptop" (minutes on 2 cores), "paper", or another that it has.
          dataset: what a preset's sizes may depend on; None is the preset's own.

        Returns:
          an object of `Settings`.

        Raises:
          ValueError: there is no such preset, or a dataset is given where there is none.

        Example:
          >>> from cbp_jax.experiments import online_permuted
          >>> online_permuted.preset("paper").hidden
          (2000, 2000, 2000)
        """
        if name not in self.presets:
            raise ValueError(f"preset must be one of {list(self.presets)}, got {name!r}")
        if not hasattr(self.Settings, "dataset"):
            if dataset is not None:
                raise ValueError(f"dataset must be left out: {self.name} has none; got {dataset!r}")
            return self.presets[name]()
        if dataset is not None:
            stream.check_dataset(dataset)
        return self.presets[name](dataset)

    def prepare(
        self,
        settings: Any,
        asked_for: Collection[str] = (),
        *,
        lanes_at_once: int | None = None,
        processes: int = 1,
    ) -> Job:
        """Checks all settings, loads the data and makes the networks; nothing is computed or written.

        Args:
          settings: what to run.
          asked_for: names of settings that are not to be made to fit where they do not, as "measured_examples" is, but
            refused.
          lanes_at_once: the most lanes (methods times seeds) that the devices hold; the others wait in the host's
            memory. By default all, or as many as the devices have memory for. Results are the same, to the last bit
            where lanes run in turn ("map"), and within rounding where they run together.
          processes: how many processes share the lanes, for what is planned and whether it fits into memory.

        Returns:
          what runs it, of a folder and of what is told of progress, as in `run`. That of methods that run as lanes has
          a `plan`.

        Raises:
          ValueError: a setting is out of range or unknown, or `lanes_at_once` is given where methods are no lanes.
          cbp_jax.data.DatasetUnavailable: the dataset is not on this machine.
        """
        if self.job is not None:
            if lanes_at_once is None:
                return self.job(settings)
            if "lanes_at_once" not in inspect.signature(self.job).parameters:
                raise ValueError(f"lanes_at_once must be left out: {self.name} has none, got {lanes_at_once}")
            return self.job(settings, lanes_at_once=lanes_at_once)
        methods = self.check(settings)
        return stream.prepare(
            self.name,
            settings,
            methods,
            self.problem(settings),
            asked_for=asked_for,
            train=self.train and self.train(settings),
            measures=self.measures and self.measures(settings),
            curves=self.curves and self.curves(settings),
            lanes_at_once=lanes_at_once,
            processes=processes,
            **self.network(settings),
        )

    def run(self, settings: Any, out: Path, progress: Progress | None = None) -> Any:
        """Runs the experiment.

        All methods with the same seed see the same tasks and start from the same weights. Results and the state are
        written as tasks end: a run that is killed leaves what it finished, and goes on from there when it is started
        again.

        Args:
          settings: what to run.
          out: folder for the results.
          progress: called after each task with the labels of the methods that ran, how many lanes (methods times seeds)
            finished it, and the means of what was measured.

        Returns:
          the results, an `xarray.Dataset`; see `report.new_results`.

        Raises:
          ValueError: as `prepare`, and where the folder holds another run.
          cbp_jax.data.DatasetUnavailable: the dataset is not on this machine.
        """
        return self.prepare(settings)(out, progress)
