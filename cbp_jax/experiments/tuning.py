"""Comparisons with an equal tuning budget: all methods are tuned in the same way, and evaluated with other seeds.

A comparison has *lanes*: methods with a search space each. All lanes try the same number of configurations with the
same tuning seeds. The best configuration of each lane, by mean performance over all tasks and tuning seeds, is run with
the reported seeds. Both are runs of an existing experiment, in the folders "tuning" and "reported" inside the
comparison's folder. They can be interrupted and resumed, and so can the comparison.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.experiments import agents, folder, intervals, learners, memory
from cbp_jax.experiments.checks import seeds_of
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.lanes import Job
from cbp_jax.experiments.learners import Method
from cbp_jax.experiments.learners.search import Space, configurations
from cbp_jax.experiments.progress import Progress
from cbp_jax.report.looks import Look, readable

TUNING, REPORTED = "tuning", "reported"


@dataclasses.dataclass(frozen=True)
class Lane:
    """A method to compare, with its search space.

    Attributes:
      name: name in results and pictures.
      method: the method with its fixed settings, as for `learners.read_methods`.
      space: by setting, the values to try, or a range to draw from, as in `learners.configurations`.
      look: its look in pictures; by default its name in readable form.
    """

    name: str
    method: Any
    space: Space = dataclasses.field(default_factory=dict)
    look: Look | None = None


@dataclasses.dataclass(frozen=True)
class TunedSettings:
    """Settings of a comparison besides those of its runs."""

    tuning_seeds: int = 2
    """Number of tuning seeds for every configuration, which are not reported."""
    first_tuning_seed: int = 1000
    """The first tuning seed; the others follow."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison with an equal budget.

    Attributes:
      experiment: the experiment to run, with settings `methods`, `seeds`, `first_seed` and `tasks` as in
        `stream.StreamSettings`, or those of agents.
      lanes: the methods to compare.
      tuning: settings of the search, without `methods`.
      reporting: settings of the reported run, without `methods`.
      measures: names and meanings of the measures to keep from the reported run.
      count: number of configurations of each lane; by default the size of the lanes' grids.
      search_seed: seed for drawing configurations.

    Example:
      >>> from cbp_jax import report
      >>> from cbp_jax.experiments import online_permuted
      >>> settings = online_permuted.preset("smoke")
      >>> lanes = (
      ...     Lane("bp", "bp", {"step_size": (0.1, 0.01)}),
      ...     Lane("l2", "l2:step_size=0.01", {"l2": (1e-3, 1e-2)}),
      ... )
      >>> tuning = dataclasses.replace(settings, first_seed=1000)
      >>> plan = Plan(online_permuted, lanes, tuning, settings, report.stream_measures())
      >>> [method.text for method in plan.tried()["l2"]]
      ['l2:step_size=0.01,l2=0.001', 'l2:step_size=0.01,l2=0.01']
    """

    experiment: Experiment
    lanes: tuple[Lane, ...]
    tuning: Any
    reporting: Any
    measures: Mapping[str, str]
    count: int | None = None
    search_seed: int = 0

    def tried(self) -> dict[str, list[Method]]:
        """Return the methods to try by lane: its configurations. All lanes with more than one have the same number.

        Raises:
          ValueError: there is no lane, two have the same name, their numbers of configurations differ, or a setting is
            not allowed.
        """
        names = [lane.name for lane in self.lanes]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"lanes must be at least one, of different names, got {names}")
        found = {}
        for lane in self.lanes:
            (method,) = learners.read_methods([lane.method])
            try:
                found[lane.name] = [method.with_settings(values) for values in self._drawn(lane)]
            except (TypeError, ValueError) as error:
                raise ValueError(f"lane {lane.name!r}: {error}") from error
        counts = {lane.name: len(found[lane.name]) for lane in self.lanes if lane.space}
        if len(set(counts.values())) > 1:
            raise ValueError(f"lanes must all try the same number of configurations, got {counts}")
        return found

    def _drawn(self, lane: Lane) -> list[dict[str, Any]]:
        return configurations(lane.space, self.count, self.search_seed)

    def check(self) -> list[str]:
        """Check everything that can be checked before computing anything.

        Returns:
          the lanes' names.

        Raises:
          ValueError: as in `tried`, or a setting of the runs is out of range, or a seed is used for both tuning and
            reporting.
        """
        tried = self.tried()
        self.experiment.check(self._searching(tried))
        self.experiment.check(_with_methods(self.reporting, [methods[0] for methods in tried.values()]))
        both = sorted(set(seeds_of(self.tuning)) & set(seeds_of(self.reporting)))
        if both:
            raise ValueError(
                f"tuning seeds must not be reported, and {both[0]} is both: tuning has {_told(self.tuning)}, "
                f"and {_told(self.reporting)} are reported"
            )
        return list(tried)

    def total(self) -> int:
        """Return the total number of tasks of all lanes in both runs, for a progress bar."""
        tried = self.tried()
        reported = _with_methods(self.reporting, [methods[0] for methods in tried.values()])
        return self.experiment.total(self._searching(tried)) + self.experiment.total(reported)

    def _searching(self, tried: Mapping[str, list[Method]]) -> Any:
        return _with_methods(self.tuning, [method for methods in tried.values() for method in methods])

    def prepare(self, name: str, settings: Any) -> Job:
        """Check everything and create the networks of the search.

        Args:
          name: name of the comparison, in results.
          settings: settings of the comparison, which are stored in results.

        Returns:
          what runs it, of a folder and of progress as in `Experiment.run`. Its results are, by lane, the measures
          [method, seed, task] with the chosen settings, `tuning_performance` [method, candidate, tuning_seed], and the
          coordinates `configurations`, JSON of the settings by name of all that was tried, and `chosen`, the text of
          the method that is reported.

        Raises:
          ValueError: as `check`, or as the experiment's `prepare`.
        """
        from cbp_jax import report

        tried = self.check() and self.tried()
        memory.check_results(len(self.lanes), self.reporting.seeds, _tasks(self.reporting), len(self.measures))
        search = self.experiment.prepare(self._searching(tried))

        def job(out: Path, progress: Progress | None = None) -> Any:
            out = Path(out)
            with folder.opened(self._empty_results(name, settings, tried), out) as results:
                done, tasks = report.runs.tasks_done(results)
                if done < tasks:
                    report.records.resume(results)
                report.save_results(results, out)
                tuned = search(out / TUNING, progress)
                chosen = choose(results, tried, tuned)
                results = with_choice(results, chosen)
                record_seconds(results, (tried, tuned))
                report.save_results(results, out)
                run = self.experiment.prepare(_with_methods(self.reporting, chosen.values()))

                def take(reported: Any) -> None:
                    self._take(results, chosen, reported)
                    best = {lane: [method] for lane, method in chosen.items()}
                    record_seconds(results, (tried, tuned), (best, reported))
                    report.save_results(results, out)

                try:
                    take(run(out / REPORTED, progress))
                except KeyboardInterrupt:  # so that finished results can be seen
                    if (out / REPORTED / report.storage.FILE_NAME).exists():
                        take(report.load_results(out / REPORTED))
                    raise
            return results

        return job

    def _empty_results(self, name: str, settings: Any, tried: Mapping[str, list[Method]]) -> Any:
        from cbp_jax import report

        seeds, most = list(seeds_of(self.tuning)), max(map(len, tried.values()))
        results = report.new_results(
            list(tried),
            list(tried),
            [{}] * len(tried),
            seeds=seeds_of(self.reporting),
            tasks=_tasks(self.reporting),
            settings=settings,
            experiment=name,
            measures=self.measures,
            looks={lane.name: lane.look or Look(readable(lane.name)) for lane in self.lanes},
        )
        drawn = [json.dumps(self._drawn(lane)) for lane in self.lanes]
        dims, shape = ("method", "candidate", "tuning_seed"), (len(tried), most, len(seeds))
        meaning = {"long_name": "mean performance over all tasks of the search; NaN where it diverged"}
        return results.assign(tuning_performance=(dims, np.full(shape, np.nan, np.float32), meaning)).assign_coords(
            candidate=np.arange(most),
            tuning_seed=np.asarray(seeds, np.int64),
            configurations=("method", drawn),
            chosen=("method", [""] * len(tried)),
        )

    def _take(self, results: Any, chosen: Mapping[str, Method], reported: Any) -> None:
        """Copy the measurements with the chosen settings, in place."""
        labels = _labels(chosen.values())
        for measure in self.measures:
            rows = [reported[measure].loc[{"method": labels[method]}].values for method in chosen.values()]
            results[measure].values[:] = np.stack(rows)


def choose(results: Any, tried: Mapping[str, list[Method]], tuned: Any) -> dict[str, Method]:
    """Choose the best configuration of each lane, the first in case of ties, and record performances in results.

    Performance is the measure named by `report.statistics.performance`, averaged over all tasks and tuning seeds. A
    configuration that diverged or did not finish with some seed, so that a performance or a loss is not finite, is
    worse than all others.

    Args:
      results: results of the comparison, whose `tuning_performance` is filled in place.
      tried: by lane, its configurations.
      tuned: results of the search.

    Returns:
      by lane, the method.
    """
    from cbp_jax.report import statistics

    measure = statistics.performance(tuned)
    labels = _labels([method for methods in tried.values() for method in methods])
    chosen = {}
    for i, (lane, methods) in enumerate(tried.items()):
        for j, method in enumerate(methods):
            of_method = tuned.loc[{"method": labels[method]}]
            values = of_method[measure].transpose("seed", "task").values.astype(np.float64)
            finite = np.isfinite(values).all(1)
            if "loss" in of_method:
                finite &= np.isfinite(of_method["loss"].transpose("seed", "task").values).all(1)
            results.tuning_performance.values[i, j] = np.where(finite, values.mean(1), np.nan)
        scores = statistics.better(measure) * results.tuning_performance.values[i, : len(methods)].mean(
            1, dtype=np.float64
        )
        chosen[lane] = methods[int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))]
    return chosen


def record_seconds(results: Any, *runs: tuple[Mapping[str, Sequence[Method]], Any]) -> None:
    """Record the seconds of each lane, in place: the sum over its methods. Lanes with the same method share its time.

    Args:
      results: results of the comparison.
      *runs: pairs of the methods by lane, and the results of their run.
    """
    from cbp_jax.report import records

    results.attrs.pop("seconds", None)
    for methods_of, run in runs:
        for label, seconds in records.seconds_of(run).items():
            lanes = [lane for lane, methods in methods_of.items() if label in _labels(methods).values()]
            records.add_seconds(results, lanes, seconds)


def with_choice(results: Any, chosen: Mapping[str, Method]) -> Any:
    """Return the results, with the chosen methods' texts and numbers as coordinates along `method`."""
    taken = {*results.variables, *results.dims}
    numbers = [method.hyperparameters for method in chosen.values()]
    names = [name for name in dict.fromkeys(name for each in numbers for name in each) if name not in taken]
    columns = {name: ("method", [each.get(name, np.nan) for each in numbers]) for name in names}
    return results.assign_coords(chosen=("method", [method.text for method in chosen.values()]), **columns)


def tuned_experiment(plan: Callable[[Any], Plan], *, name: str, **what: Any) -> Experiment:
    """Make an experiment that is a comparison with an equal tuning budget.

    Args:
      plan: maps settings to the comparison.
      name: name of the experiment.
      **what: other fields of `Experiment`, such as `Settings` and `presets`.
    """
    return Experiment(
        name=name,
        check=lambda settings: plan(settings).check(),
        total=lambda settings: plan(settings).total(),
        job=lambda settings: plan(settings).prepare(name, settings),
        **what,
    )


def _tasks(settings: Any) -> int:
    """Return the number of tasks of each seed; for agents, of intervals."""
    return intervals.num_intervals(settings) if isinstance(settings, agents.Settings) else settings.tasks


def _with_methods(settings: Any, methods: Any) -> Any:
    """Return the settings with these methods, each once."""
    return dataclasses.replace(settings, methods=tuple(_labels(methods)))


def _labels(methods: Any) -> dict[Method, str]:
    """Return the names of methods in results, by method: several lanes may choose the same method."""
    found: dict[Method, str] = {}
    for method in methods:
        found.setdefault(method, method.label)
    return found


def _told(settings: Any) -> str:
    seeds = seeds_of(settings)
    return f"{seeds[0]} to {seeds[-1]}"
