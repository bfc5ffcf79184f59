"""The dataclass `Experiment`."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cbp_jax.experiments import stream
from cbp_jax.experiments.checks import check_dataset
from cbp_jax.experiments.empty_results import Curve
from cbp_jax.experiments.lanes import Job
from cbp_jax.experiments.progress import Progress
from cbp_jax.problems import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """An experiment: which methods are compared on which stream of tasks, and how results are shown.

    An experiment on a stream of tasks needs the first five fields; its settings extend `stream.StreamSettings`.
    Experiments in `EXPERIMENTS` are run by name, others by their import path.

    Attributes:
      name: its name in commands and results.
      about: a line that describes it in lists.
      Settings: a frozen dataclass, whose fields are the options of the command line.
      presets: by name, functions that return settings. They take a dataset's name or None if `Settings` has `dataset`,
        otherwise no arguments.
      problem: maps settings to the stream of tasks, a `problems.Problem`.
      network: maps settings to further arguments of `learners.make_learner`, such as settings of the network.
      train: maps settings to a replacement of `training.run_tasks`.
      measures: maps settings to the measures of `train`: names and meanings.
      curves: maps settings to measures of `train` at several points of a task, by name: a `stream.Curve` each.
      check: takes settings, raises a ValueError if they are out of range, and returns the methods.
      total: maps settings to the total number of tasks of all lanes, for a progress bar.
      plot: draws pictures of results, `plot(results, folder, formats)`, and returns their paths.
      summary: maps results to a text table.
      job: maps settings to a function that runs them, for experiments that are not streams of tasks and have no
        `problem`.
    """

    name: str
    about: str
    Settings: type
    presets: Mapping[str, Callable[..., Any]]
    problem: Callable[[Any], Problem] | None = None
    network: Callable[[Any], Mapping[str, Any]] = lambda settings: {}
    train: Callable[[Any], Callable[..., Iterator[dict[str, Any]]]] | None = None
    measures: Callable[[Any], Mapping[str, str]] | None = None
    curves: Callable[[Any], Mapping[str, Curve]] | None = None
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
        """Return the settings of a preset.

        Args:
          name: one of `presets`: "smoke" (seconds), "laptop" (minutes on 2 cores), "paper", or another.
          dataset: a dataset, on which a preset's sizes may depend; None for the preset's default.

        Returns:
          an object of `Settings`.

        Raises:
          ValueError: there is no such preset, or a dataset is given although the experiment has none.

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
            check_dataset(dataset)
        return self.presets[name](dataset)

    def prepare(
        self,
        settings: Any,
        asked_for: Collection[str] = (),
        *,
        lanes_at_once: int | None = None,
        processes: int = 1,
    ) -> Job:
        """Check all settings, load the data and create the networks. Nothing is computed or written.

        Args:
          settings: what to run.
          asked_for: names of settings that were given explicitly. If they do not fit, an error is raised; others, such
            as "measured_examples", are adjusted.
          lanes_at_once: the most lanes (methods times seeds) to keep on the devices; the others wait in the host's
            memory. By default all, or as many as fit into the devices' memory. Results are the same, bit for bit if
            lanes run in turn ("map"), and within rounding if they run together.
          processes: how many processes share the lanes; the plan and the check of memory take it into account.

        Returns:
          a function of a folder and a progress callback, as in `run`, that runs the experiment. If methods run as
          lanes, it has an attribute `plan`.

        Raises:
          ValueError: a setting is out of range or unknown, or `lanes_at_once` is given although methods do not run as
            lanes.
          cbp_jax.data.DatasetUnavailable: the dataset is not on this machine.
        """
        if self.job is not None:
            if lanes_at_once is None:
                return self.job(settings)
            if "lanes_at_once" not in inspect.signature(self.job).parameters:
                raise ValueError(f"lanes_at_once must be left out: {self.name} has no lanes, got {lanes_at_once}")
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
        """Run the experiment.

        All methods with the same seed see the same tasks and start from the same weights. Results and the state are
        written as tasks end: a killed run keeps its results, and resumes from there when it is started again.

        Args:
          settings: what to run.
          out: folder for the results.
          progress: called after each task with the labels of the methods that ran, the number of lanes (methods times
            seeds) that finished it, and mean measurements of the lanes that have not diverged.

        Returns:
          the results, an `xarray.Dataset`; see `report.new_results`.

        Raises:
          ValueError: as in `prepare`, or the folder holds another run.
          cbp_jax.data.DatasetUnavailable: the dataset is not on this machine.
        """
        return self.prepare(settings)(out, progress)
