"""Runs methods with all seeds, task by task, and keeps their results and states on disk.

A *lane* is a method with a seed. Lanes of methods that differ only in numbers run as one compiled program.
"""

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cbp_jax import stops, training
from cbp_jax.experiments import folder, learners, memory
from cbp_jax.experiments.plan import Plan, Program, Timed
from cbp_jax.experiments.progress import Progress, labels_of, note, tell
from cbp_jax.experiments.share import Share

SAVE_EVERY = 2.0  # seconds between writes of the results
CHECKPOINT_EVERY = 30.0  # seconds between writes of the state
TIMED_FOR = 1.0  # seconds for which tasks after the first are timed, one at least

# folder, progress -> results; everything is checked
Job = Callable[[Path, Progress | None], Any]
# seeds [lanes], arrays [lanes] of hyperparameters, checkpoint, the most lanes on the devices at once (None for all)
# -> arrays [lanes] of what was measured, for each task
Train = Callable[[np.ndarray, dict[str, np.ndarray], training.Checkpoint, int | None], Iterator[dict[str, Any]]]


class Prepared(NamedTuple):
    """Methods that are ready to run: a `Job` with a plan.

    Attributes:
      results: empty results.
      groups: methods that run as lanes of one program, and the function that trains them.
      plan: the programs to compile, and the memory that they need.
    """

    results: Any
    groups: list[tuple[list[learners.Method], Train]]
    plan: Plan

    def __call__(self, out: Path, progress: Progress | None = None, share: Share | None = None) -> Any:
        """Run the methods, fill the results, and keep them and the state on disk; see `prepare_methods`.

        Args:
          out: folder of the run.
          progress: as in `Experiment.run`.
          share: this process, if several share the lanes; it must hold the folder by `folder.claimed`. Only its lanes
            are run; `folder.join` joins the results later.

        Returns:
          the results; with several processes, those that existed at the start and those of this process.

        Raises:
          ValueError: as in `prepare_methods`, or the share has no lane.
        """
        from cbp_jax import report

        out = Path(out)
        if share is not None:
            share.check(self.num_lanes())
        own = self.lanes(share)
        with (
            training.one_blas_thread(),
            folder.kept(self.results, out, share, [lane for lanes in own for lane in lanes]) as kept,
            stops.held_back(lambda text: note(progress, text)) as held,
        ):
            found = kept.results
            found.attrs.pop("failed", None)  # of an earlier process
            if share is not None and share.index == 0 and not (out / report.storage.FILE_NAME).exists():
                report.save_results(self.results, out)
            kept.clean()
            try:
                for (group, train), program, lanes in zip(self.groups, self.plan.programs, own, strict=True):
                    _run_group(kept, group, train, lanes, progress, program.at_once, held)
            except Exception as error:
                found.attrs["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise
            finally:
                kept.save()
            if share is None:
                folder.remove_parts(out)
        return found

    def timed(self, share: Share | None = None, tell: Callable[[str], None] = print) -> tuple[Timed, ...]:
        """Compile each program, and time its first tasks, with the lanes of one call. Nothing is kept.

        Args:
          share: this process, if several share the lanes.
          tell: called with a message if memory runs out, and fewer lanes are tried.

        Returns:
          the times of each program of the plan, as far as this process has lanes of it.
        """
        found = []
        for (group, train), program, lanes in zip(self.groups, self.plan.programs, self.lanes(share), strict=True):
            at_once, timed = program.at_once, None
            while lanes and timed is None:
                calls = training.Lanes(len(lanes), program.mode, at_once=at_once)
                try:
                    first, task = _seconds(group, train, lanes[: calls.of_a_call], self.plan.tasks, at_once)
                    timed = Timed(
                        program.methods, calls.of_a_call, calls.calls, self.plan.tasks, first, task, memory.peak()
                    )
                except jax.errors.JaxRuntimeError as error:
                    at_once = memory.fewer_lanes(error, len(lanes), at_once)
                if timed is None:
                    gc.collect()
                    tell(memory.fewer_text(at_once))
            found += [] if timed is None else [timed]
        return tuple(found)

    def num_lanes(self) -> int:
        """Return the number of lanes of all programs."""
        return sum(len(group) for group, _ in self.groups) * self.results.sizes["seed"]

    def lanes(self, share: Share | None = None) -> list[list[training.Lane]]:
        """Return the lanes of each group, methods with their seeds; with a share, only the lanes of that process."""
        seeds, found, dealt = self.results.seed.values.tolist(), [], 0
        for group, _ in self.groups:
            lanes = [(method.label, seed) for method in group for seed in seeds]
            found.append(lanes if share is None else [lanes[number] for number in share.lanes(len(lanes), dealt)])
            dealt += len(lanes)
        return found


def prepare_methods(
    results: Any,
    methods: Sequence[learners.Method],
    make: Callable[[list[learners.Method]], tuple[Train, Program]],
    processes: int = 1,
) -> Prepared:
    """Prepare a function that runs methods with all seeds, fills the results, and keeps them and the state on disk.

    Args:
      results: empty, from `empty_results`. One of its measures is `replaced_units`, which shows which tasks have run.
      methods: the methods to run.
      make: maps methods that differ only in numbers, which run as lanes of one program, to the function that trains
        them and to its plan.
      processes: number of processes that share the lanes.

    Returns:
      a function of a folder and a progress callback, as in `run`, that returns the results, including those already on
      disk. It raises a BlockingIOError if another run is active in the folder, and a ValueError if the folder holds
      another run or a state that cannot be used; neither is changed.
    """
    groups = [(group, *make(group)) for group in _compiled_together(methods)]
    programs = tuple(program for *_, program in groups)
    plan = Plan(programs, results.sizes["seed"], results.sizes["task"], processes)
    return Prepared(results, [(group, train) for group, train, _ in groups], plan)


def _compiled_together(methods: Sequence[learners.Method]) -> list[list[learners.Method]]:
    """Group methods of one learner that differ only in numbers: each group runs as lanes of one program."""
    groups: dict[Any, list[learners.Method]] = {}
    for method in methods:
        groups.setdefault((method.learner, tuple(sorted(method.options.items()))), []).append(method)
    return list(groups.values())


def program_of(group: Sequence[learners.Method], settings: Any, lanes_at_once: int | None) -> Program:
    """Return the plan of methods that run as lanes of one program."""
    labels = tuple(method.label for method in group)
    return Program(labels, len(group) * settings.seeds, at_once=lanes_at_once, mode=settings.lanes)


def _run_group(
    kept: folder.Kept,
    group: list[learners.Method],
    train: Train,
    lanes: Sequence[training.Lane],
    progress: Progress | None,
    at_once: int | None,
    held: stops.Stops,
) -> None:
    """Run the remaining tasks of the lanes of one program, with fewer lanes at once if memory runs out."""
    results, tasks = kept.results, kept.results.sizes["task"]
    name = "; ".join(method.label for method in group)
    every = [(method.label, seed) for method in group for seed in results.seed.values.tolist()]
    ready, waiting = _progress_of(kept, name, every, lanes)
    if progress is not None and ready:
        progress(labels_of(ready), len(ready) * tasks, {})
    for states in waiting:
        cohort, told, done = [lane for lane, _ in states], 0, False
        while not done:
            checkpoint = training.Checkpoint(
                kept.state_path(name, cohort, every),
                name,
                every=CHECKPOINT_EVERY,
                before=kept.save,
                needs=lambda tasks, cohort=cohort: kept.digests(cohort, tasks),
                lanes=cohort,
                found=_joined([(lane, kept.checked(saved, lane)) for lane, saved in states if saved is not None]),
                stops=held,
            )
            if progress is not None and checkpoint.tasks > told:
                progress(labels_of(cohort), len(cohort) * (checkpoint.tasks - told), {})
            told = max(told, checkpoint.tasks)
            try:
                for task in _run_lanes(kept, group, train, checkpoint, progress, told, at_once):
                    told = max(told, task + 1)
                done = True
            except jax.errors.JaxRuntimeError as error:
                at_once = memory.fewer_lanes(error, len(cohort), at_once)
            if not done:  # outside of `except`, where the error would keep the arrays of the failed call
                held.release()
                gc.collect()
                note(progress, memory.fewer_text(at_once))
                states = [each for found in _progress_of(kept, name, every, cohort)[1] for each in found]
                done = not states  # after the last task
        kept.close(checkpoint)
        held.release()


def _progress_of(
    kept: folder.Kept, name: str, every: Sequence[training.Lane], lanes: Sequence[training.Lane]
) -> tuple[list[training.Lane], list[list[tuple[training.Lane, training.Saved | None]]]]:
    """Return the lanes that are done, and the others with their states, grouped by the number of tasks they have
    done."""
    saved = kept.states(name, every)
    # This is the only measure that stays finite if training diverges.
    recorded = np.isfinite(kept.results.replaced_units.values).all(-1)
    ready, waiting = [], {}
    for lane, row, column in zip(lanes, *kept.positions(lanes), strict=True):
        states = [state for state in saved if lane in state.lanes]
        noted = any(state.state is None for state in states)
        if recorded[row, column] and (noted or not states):
            ready.append(lane)
            continue
        # Recorded lanes still have a state if the run stopped after their last task and before everything was done.
        states = [state for state in states if state.state is not None]
        best = max(states, key=lambda state: state.tasks, default=None)
        waiting.setdefault(best.tasks if best else 0, []).append((lane, best))
    return ready, [waiting[done] for done in sorted(waiting, reverse=True)]


def _joined(states: Sequence[tuple[training.Lane, training.Saved]]) -> training.Saved | None:
    """Join states of lanes that have done the same number of tasks: each lane is a row of its saved state."""
    if not states:
        return None
    first = states[0][1]
    if len({saved.path for _, saved in states}) == 1 and [lane for lane, _ in states] == list(first.lanes):
        return first
    row_of = lambda saved, row: jax.tree.map(lambda leaf: np.asarray(leaf)[row], saved.state)
    rows = [row_of(saved, saved.lanes.index(lane)) for lane, saved in states]
    return first._replace(state=jax.tree.map(lambda *leaves: np.stack(leaves), *rows), lanes=None)


def _run_lanes(
    kept: folder.Kept,
    group: list[learners.Method],
    train: Train,
    checkpoint: training.Checkpoint,
    progress: Progress | None,
    told: int,
    at_once: int | None,
) -> Iterator[int]:
    """Run the lanes of a checkpoint to their last task, and yield each task that they have done.

    Tasks before `told` were reported before memory ran out, and are not reported again.
    """
    from cbp_jax import report

    results, lanes = kept.results, checkpoint.lanes
    lap = report.records.stopwatch(results, list(dict.fromkeys(label for label, _ in lanes)))
    saved = time.monotonic()
    rows_of_tasks = train(*arguments_of(group, lanes), checkpoint, at_once)
    for task, measured in enumerate(rows_of_tasks, start=checkpoint.tasks):
        report.record_lanes(results, task, measured, lanes)
        lap()
        diverged = report.mark_diverged(results, task, lanes=lanes)
        if time.monotonic() - saved > SAVE_EVERY:
            kept.save()
            saved = time.monotonic()
        if task >= told:
            healthy = ~report.divergence.diverged_by(results, task, lanes)
            tell(progress, lanes, task, measured, diverged, healthy)
        yield task


def _seconds(
    group: Sequence[learners.Method], train: Train, lanes: Sequence[training.Lane], tasks: int, at_once: int | None
) -> tuple[float, float | None]:
    """Return the seconds of the first task, with compilation, and of a later one, if there is one."""
    with tempfile.TemporaryDirectory() as unused, training.one_blas_thread():
        checkpoint = training.Checkpoint(Path(unused) / "state", "timed", every=math.inf, lanes=lanes)
        ends = [time.perf_counter()]
        rows_of_tasks = train(*arguments_of(group, lanes), checkpoint, at_once)
        # Short tasks are timed several times. The iterator is never asked for more than all tasks, after which it would
        # finish the run.
        while len(ends) <= tasks and (len(ends) < 3 or ends[-1] - ends[1] < TIMED_FOR):
            next(rows_of_tasks)
            ends.append(time.perf_counter())
        first, later = ends[1] - ends[0], np.diff(ends[1:])
        return first, float(np.median(later)) if later.size else None


def arguments_of(
    group: Sequence[learners.Method], lanes: Sequence[training.Lane]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the seeds [lanes] and the hyperparameters [lanes] by name of lanes of one program."""
    methods = {method.label: method for method in group}
    numbers = {
        name: np.asarray([methods[label].hyperparameters[name] for label, _ in lanes])
        for name in group[0].hyperparameters
    }
    return np.asarray([seed for _, seed in lanes]), numbers
