"""What the experiments on streams of tasks share: settings, their checks, and the run itself."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from cbp_jax import curvature, data, losses, nets, training
from cbp_jax.experiments import folder, learners, memory
from cbp_jax.experiments.plan import Plan, Program
from cbp_jax.experiments.share import Share
from cbp_jax.problems import Problem

MOST_STEPS = 2**31 - 1  # they are counted in int32
SAVE_EVERY = 2.0  # seconds between two writings of the results
CHECKPOINT_EVERY = 30.0  # seconds between two writings of the state


# Labels of the methods that ran, lanes that finished a task, means of what was measured, over lanes that have a number.
# An object may have methods besides: `task_done(method, task, means)`, called for each method alone, and
# `diverged(method, seed, task)`, in place of a warning where the loss of a lane is not finite any more; tasks from 0.
Progress = Callable[[str, int, dict[str, float]], None]
# folder, progress -> results; everything is checked
Job = Callable[[Path, Progress | None], Any]
# seeds [lanes], arrays [lanes] of hyperparameters, checkpoint -> arrays [lanes] of what was measured, for each task
Train = Callable[[np.ndarray, dict[str, np.ndarray], training.Checkpoint], Iterator[dict[str, Any]]]


class Curve(NamedTuple):
    """What is measured of a task at several points.

    Attributes:
      meaning: of a value.
      dim: name of the points, a dimension of results.
      points: their coordinates.
    """

    meaning: str
    dim: str
    points: Sequence[float]


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """Settings of every experiment on a stream of tasks."""

    methods: tuple[str, ...] = ("bp", "cbp")
    """Learners to compare: names, optionally with settings, "cbp:replacement_rate=1e-5,utility=weight"; or functions
    that create an optax transformation: "my_module:my_factory(learning_rate=0.01)"."""
    seeds: int = 3
    """Number of runs of each method, with different seeds."""
    first_seed: int = 0
    """The first seed; the others follow. Choose settings on some seeds and report results on others."""
    tasks: int = 10
    """Number of tasks."""
    batch_size: int = 1
    """Examples of an update."""
    hidden: tuple[int, ...] = (100, 100, 100)
    """Sizes of the hidden layers, unless a method sets its own; no sizes make a linear network."""
    activation: str = "relu"
    """Activation of the hidden layers, unless a method sets its own."""
    measured_examples: int = 2000
    """Number of examples on which dead units and ranks are measured before each task; all of its examples, if it has
    fewer."""
    measure_every: int | None = None
    """Number of updates between measurements of plasticity and gradients; by default they are not measured."""
    lanes: Literal["auto", "vmap", "map"] = "auto"
    """How seeds run on one device: in parallel (vmap) or in turn (map); auto chooses by device."""


@dataclasses.dataclass(frozen=True)
class ImageStreamSettings(StreamSettings):
    """Settings of a stream of tasks made of a dataset."""

    network: str = "mlp"
    """One of mlp, convnet, lenet, resnet18 and vit, optionally with settings: "vit:depth=2,width=32"; or a Flax module:
    "my_module:MyNet(width=64)". Networks that do not accept images get flattened images."""
    dataset: str = "digits"
    """A name of `cbp_jax.data.names()` or of tensorflow-datasets, or the path of an array file (.npz)."""
    examples_per_task: int | None = None
    """Examples of each task, all of the dataset by default."""
    data_dir: Path | None = None
    """Folder of prepared datasets; by default that of tensorflow-datasets."""


def check_counts(settings: Any, *names: str) -> None:
    """Raises a ValueError if one of these settings is given and less than 1."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check(settings: StreamSettings) -> list[learners.Method]:
    """Checks settings before anything is computed.

    Returns:
      the methods.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    check_counts(settings, "seeds", "tasks", "batch_size", "measured_examples", "measure_every")
    check_first_seed(settings)
    check_hidden(settings.hidden)
    nets.get_activation(settings.activation)
    if settings.lanes not in ("auto", "vmap", "map"):
        raise ValueError(f"lanes must be 'auto', 'vmap' or 'map', got {settings.lanes!r}")
    if hasattr(settings, "dataset"):
        check_dataset(settings.dataset)
    methods = check_methods(settings.methods, settings.activation)
    network = nets.read(getattr(settings, "network", "mlp"))
    if settings.activation != StreamSettings.activation and not network.takes("activation"):
        raise ValueError(
            f"activation must be {StreamSettings.activation!r}, as network {network.name!r} has no setting for it, "
            f"got {settings.activation!r}"
        )
    for method in methods:
        for name in method.network:
            if not network.takes(name):
                raise ValueError(f"method {method.text!r}: network {network.name!r} has no {name}")
    return methods


def check_first_seed(settings: Any) -> None:
    """Raises a ValueError unless all seeds are numbers of int32 from 0."""
    most = max(0, MOST_STEPS - settings.seeds)
    if not 0 <= settings.first_seed <= most:
        raise ValueError(f"first_seed must be from 0 to {most}, got {settings.first_seed}")


def seeds_of(settings: Any) -> range:
    """The seeds of a run."""
    return range(settings.first_seed, settings.first_seed + settings.seeds)


def check_hidden(sizes: Sequence[int]) -> None:
    """Raises a ValueError unless all hidden layers have units; a network without hidden layers is linear."""
    if any(size < 1 for size in sizes):
        raise ValueError(f"hidden must be sizes of at least 1, or none for a linear network, got {tuple(sizes)}")


def check_dataset(name: str) -> None:
    """Raises a ValueError unless the name of a dataset says something."""
    if not name.strip():
        raise ValueError(f"dataset must be a name or the path of an array file, got {name!r}")


def check_classes(images: data.Dataset) -> data.Dataset:
    """The dataset; raises a ValueError if there is nothing to tell apart in it."""
    if images.num_classes < 2:
        raise ValueError(f"dataset must have at least 2 classes, and {images.name!r} has {images.num_classes}")
    return images


def flat(settings: ImageStreamSettings, images: data.Dataset) -> bool:
    """Whether the network gets images as vectors, as features are.

    Raises:
      ValueError: it takes neither images of this size nor vectors.
    """
    network = nets.read(settings.network)
    own = network.own({"hidden": settings.hidden, "activation": settings.activation})
    if not images.has_features:
        return not network.takes_images(images.image_shape, images.num_classes, **own)
    try:
        network.make(images.image_shape, images.num_classes, **own)
    except ValueError as error:
        raise ValueError(
            f"network {network.name!r} needs images, and {settings.dataset!r} holds features ({error})"
        ) from error
    return True


def check_methods(methods: Sequence[Any], activation: str) -> list[learners.Method]:
    """Reads methods that are to be compared, on networks of an activation; see `learners.read_methods`.

    Raises:
      ValueError: there are none, or two are the same, or one is unknown.
    """
    return learners.read_methods(methods, activation=activation)


def total(settings: StreamSettings) -> int:
    """How many tasks all lanes have to do, for a progress bar."""
    return len(settings.methods) * settings.seeds * settings.tasks


def summary(results: Any) -> str:
    """The table of a run; see `report.summary`."""
    from cbp_jax import report

    return report.summary(results)


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draws the pictures of a run; see `report.plot_run`."""
    from cbp_jax import report

    return report.plot_run(results, out, formats=formats)


def run(
    experiment: str, settings: StreamSettings, problem: Problem, out: Path, progress: Progress | None = None, **how: Any
) -> Any:
    """Runs a stream of tasks of one's own, as `Experiment.run` runs an experiment's.

    Args:
      experiment: its name.
      settings: what to run.
      problem: the stream.
      out, progress: as in `Experiment.run`.
      **how: as in `prepare`.
    """
    return prepare(experiment, settings, check(settings), problem, **how)(out, progress)


def prepare(
    experiment: str,
    settings: StreamSettings,
    methods: Sequence[learners.Method],
    problem: Problem,
    *,
    asked_for: Collection[str] = (),
    train: Callable[..., Iterator[dict[str, Any]]] | None = None,
    measures: Mapping[str, str] | None = None,
    curves: Mapping[str, Curve] | None = None,
    lanes_at_once: int | None = None,
    processes: int = 1,
    **network: Any,
) -> "Prepared":
    """Checks settings that depend on the stream of tasks, and makes the learners.

    Args:
      experiment: its name.
      settings: what to run.
      methods: that are compared, as `check` returns them.
      problem: the stream.
      asked_for: names of settings that are not made to fit where they do not.
      train: what takes the place of `training.run_tasks`.
      measures: what it measures, names and meanings, where it is not what `report.stream_measures` says.
      curves: what it measures of a task at several points, by name.
      lanes_at_once: the most lanes that the devices hold; by default all, or as many as they have memory for.
      processes: how many share the lanes.
      **network: how to make the network, see `learners.make_learner`.

    Returns:
      what runs it, of a folder and of what is told of progress.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    from cbp_jax import report

    every, dormant_threshold = settings.measure_every, getattr(settings, "dormant_threshold", None)
    if every is not None and every > problem.steps_per_task:
        raise ValueError(f"measure_every must be at most the {problem.steps_per_task} updates of a task, got {every}")
    measured = settings.measured_examples
    if problem.examples is not None and measured > problem.examples:
        if "measured_examples" in asked_for:
            raise ValueError(
                f"measured_examples must be at most the {problem.examples} examples that a task has, got {measured}"
            )
        measured = problem.examples
    measures = measures or report.stream_measures(
        accuracy="accuracy" in losses.LOSSES[problem.loss].metrics,
        updates=every is not None,
        test=problem.test is not None,
        dormant=dormant_threshold is not None,
    )
    if getattr(problem, "steps_per_task", 0) > MOST_STEPS:
        raise ValueError(
            f"a task must have at most {MOST_STEPS} updates, and has {problem.steps_per_task}; choose fewer "
            "examples or epochs, or a larger batch_size"
        )
    for sizes in {settings.hidden, *(method.hidden for method in methods if method.hidden is not None)}:
        memory.check_layers((math.prod(problem.input_shape), *sizes, problem.num_classes))
    memory.check_examples(measured, problem.input_shape)
    numbers_each = len(measures) + sum(len(curve.points) for curve in (curves or {}).values())
    memory.check_results(len(methods), settings.seeds, settings.tasks, numbers_each)

    check_lanes_at_once(lanes_at_once)

    def make(group: list[learners.Method]) -> tuple[Train, Program]:
        learner = learners.make_learner(
            group,
            settings.hidden,
            settings.activation,
            problem.input_shape,
            problem.num_classes,
            **{"network": getattr(settings, "network", "mlp"), **network},
        )
        lane, shared = memory.check_states(learner, group, settings.seeds, processes), _size_of(problem.data)
        program = program_of(group, settings, lanes_at_once)._replace(lane_bytes=lane, shared_bytes=shared)
        if lanes_at_once is None:
            at_once = memory.lanes_that_fit(lane, math.ceil(program.lanes / processes), shared)
            program = program._replace(at_once=at_once)
        # Not every function that trains knows of batches.
        in_batches = {} if program.at_once is None else {"lanes_at_once": program.at_once}
        if group[0].curvature:
            _check_curvature(learner, problem, group[0].text)
        run = lambda seeds, numbers, checkpoint: (train or training.run_tasks)(
            learner,
            problem,
            seeds,
            numbers,
            settings.tasks,
            mode=settings.lanes,
            measured_examples=measured,
            measure_every=every,
            dormant_threshold=dormant_threshold,
            checkpoint=checkpoint,
            **in_batches,
        )
        return run, program

    empty = empty_results(experiment, settings, methods, settings.tasks, measures)
    return prepare_methods(with_curves(empty, curves or {}), methods, make, processes)


def check_lanes_at_once(lanes: int | None) -> None:
    """Raises a ValueError if a number of lanes is given and less than 1."""
    if lanes is not None and lanes < 1:
        raise ValueError(f"lanes_at_once must be at least 1, got {lanes}")


def program_of(group: Sequence[learners.Method], settings: Any, lanes_at_once: int | None) -> Program:
    """The plan of methods that run as lanes of one program."""
    labels = tuple(method.label for method in group)
    return Program(labels, len(group) * settings.seeds, at_once=lanes_at_once)


def _size_of(data: Any) -> int:
    """Bytes of arrays."""
    return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(data))


def empty_results(
    experiment: str,
    settings: Any,
    methods: Sequence[learners.Method],
    tasks: int,
    measures: Mapping[str, str],
) -> Any:
    """The results of methods before their first task; see `report.new_results`."""
    from cbp_jax import report

    return report.new_results(
        [method.label for method in methods],
        [method.learner for method in methods],
        [_numbers(method, taken={"method", "learner", "seed", "task", *measures}) for method in methods],
        seeds=seeds_of(settings),
        tasks=tasks,
        settings=dataclasses.replace(settings, methods=texts(settings, methods)),
        experiment=experiment,
        measures=measures,
        looks=learners.looks_by_learner(methods),
    )


def texts(settings: Any, methods: Sequence[learners.Method]) -> tuple[str, ...]:
    """The methods of settings as texts, functions too, which are the same in every process."""
    return tuple(
        given if isinstance(given, str) else method.text
        for given, method in zip(settings.methods, methods, strict=True)
    )


def with_curves(results: Any, curves: Mapping[str, Curve]) -> Any:
    """Empty results with what is measured of each task at several points, [method, seed, task, points]."""
    for name, curve in curves.items():
        dims = ("method", "seed", "task", curve.dim)
        blank = np.full((*(results.sizes[dim] for dim in dims[:3]), len(curve.points)), np.nan, np.float32)
        results = results.assign({name: (dims, blank, {"long_name": curve.meaning})})
        results = results.assign_coords({curve.dim: list(curve.points)})
    return results


def _check_curvature(learner: training.Learner, problem: Problem, method: str) -> None:
    """Raises a ValueError if the network is not of those whose curvature is known, which a method asks for."""

    def diagonal(data, key):
        x, y = problem.batch(data, problem.make_task(data, key, 0), 0)
        outputs_of = lambda params, x: learner.predict(params, x)[0]
        return curvature.hesscale(outputs_of, learner.init(key), x, y, problem.loss)[2]

    try:
        jax.eval_shape(diagonal, problem.data, jax.random.key(0))
    except ValueError as error:
        raise ValueError(f"method {method!r} needs the network's curvature: {error}") from error


class Prepared(NamedTuple):
    """Methods that are ready to run: a `Job` that tells its plan.

    Attributes:
      results: empty.
      groups: methods that run as lanes of one program, and what trains them.
      plan: what is compiled, and the memory that it takes.
    """

    results: Any
    groups: list[tuple[list[learners.Method], Train]]
    plan: Plan

    def __call__(self, out: Path, progress: Progress | None = None, share: Share | None = None) -> Any:
        """Runs the methods, fills the results, and keeps them and the state on disk; see `prepare_methods`.

        Args:
          out: folder of the run.
          progress: as in `Experiment.run`.
          share: this process, where several run the lanes together, and have the folder by `folder.claimed`. It runs
            its lanes alone; `folder.join` joins the results then.

        Returns:
          the results; of several processes, those that were there at the start and those of this one.

        Raises:
          ValueError: as in `prepare_methods`, and for a share that has no lane.
        """
        from cbp_jax import report

        out = Path(out)
        if share is not None:
            share.check(self.num_lanes())
        own = self.lanes(share)
        with (
            training.one_blas_thread(),
            folder.kept(self.results, out, share, [lane for lanes in own for lane in lanes]) as kept,
        ):
            found = kept.results
            found.attrs.pop("failed", None)  # of an earlier process
            if share is not None and share.index == 0 and not (out / report.results.FILE_NAME).exists():
                report.save_results(self.results, out)
            kept.clean()
            try:
                for (group, train), lanes in zip(self.groups, own, strict=True):
                    _run_group(kept, group, train, lanes, progress)
            except Exception as error:
                found.attrs["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise
            finally:
                kept.save()
            if share is None:
                folder.remove_parts(out)
        return found

    def num_lanes(self) -> int:
        """How many lanes all programs have."""
        return sum(len(group) for group, _ in self.groups) * self.results.sizes["seed"]

    def lanes(self, share: Share | None = None) -> list[list[training.Lane]]:
        """The lanes of each group, methods with their seeds; where several processes share them, those of one."""
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
    """Prepares what runs methods with all seeds, fills the results, and keeps them and the state on disk.

    Args:
      results: empty, of `empty_results`; one of its measures is `replaced_units`, which tells what has been run.
      methods: what to run.
      make: gives for methods that differ in their numbers alone, which run as lanes of one program, what trains them,
        and the plan of it.
      processes: how many share the lanes.

    Returns:
      a function of a folder and of progress as in `run`, to the results, of which those on disk are a part. It raises
      a BlockingIOError where another run is at work in the folder, and a ValueError where the folder holds another run,
      or a state that cannot be used; both are left as they are.
    """
    groups = [(group, *make(group)) for group in _compiled_together(methods)]
    programs = tuple(program for *_, program in groups)
    plan = Plan(programs, results.sizes["seed"], results.sizes["task"], processes)
    return Prepared(results, [(group, train) for group, train, _ in groups], plan)


def _run_group(
    kept: folder.Kept,
    group: list[learners.Method],
    train: Train,
    lanes: Sequence[training.Lane],
    progress: Progress | None,
) -> None:
    """Does what is left of lanes of methods that are one program."""
    results, tasks = kept.results, kept.results.sizes["task"]
    name = "; ".join(method.label for method in group)
    every = [(method.label, seed) for method in group for seed in results.seed.values.tolist()]
    ready, waiting = _progress_of(kept, name, every, lanes)
    if progress is not None and ready:
        progress(_labels_of(ready), len(ready) * tasks, {})
    for states in waiting:
        cohort = [lane for lane, _ in states]
        checkpoint = training.Checkpoint(
            kept.state_path(name, cohort, every),
            name,
            every=CHECKPOINT_EVERY,
            before=kept.save,
            needs=lambda tasks, cohort=cohort: kept.digests(cohort, tasks),
            lanes=cohort,
            found=_joined([(lane, kept.checked(saved, lane)) for lane, saved in states if saved is not None]),
        )
        if progress is not None and checkpoint.tasks:
            progress(_labels_of(cohort), len(cohort) * checkpoint.tasks, {})
        _run_lanes(kept, group, train, checkpoint, progress)
        kept.close(checkpoint)


def _progress_of(
    kept: folder.Kept, name: str, every: Sequence[training.Lane], lanes: Sequence[training.Lane]
) -> tuple[list[training.Lane], list[list[tuple[training.Lane, training.Saved | None]]]]:
    """The lanes that are done, and the others with their states: together those that have done as many tasks."""
    saved = kept.states(name, every)
    # Of all measures the one that stays a number where training has diverged.
    recorded = np.isfinite(kept.results.replaced_units.values).all(-1)
    ready, waiting = [], {}
    for lane, row, column in zip(lanes, *kept.positions(lanes), strict=True):
        states = [state for state in saved if lane in state.lanes]
        noted = any(state.state is None for state in states)
        if recorded[row, column] and (noted or not states):
            ready.append(lane)
            continue
        # A state of lanes that are recorded is left where they were stopped after their last task and before all was
        # done.
        states = [state for state in states if state.state is not None]
        best = max(states, key=lambda state: state.tasks, default=None)
        waiting.setdefault(best.tasks if best else 0, []).append((lane, best))
    return ready, [waiting[done] for done in sorted(waiting, reverse=True)]


def _joined(states: Sequence[tuple[training.Lane, training.Saved]]) -> training.Saved | None:
    """One state of lanes that have done as many tasks, each a row of a state."""
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
) -> None:
    """Runs the lanes of a checkpoint to their last task."""
    from cbp_jax import report

    results, lanes = kept.results, checkpoint.lanes
    methods = {method.label: method for method in group}
    labels = list(dict.fromkeys(label for label, _ in lanes))
    numbers = {
        name: np.asarray([methods[label].hyperparameters[name] for label, _ in lanes])
        for name in group[0].hyperparameters
    }
    report.records.resume(results)
    saved = since = time.monotonic()
    rows_of_tasks = train(np.asarray([seed for _, seed in lanes]), numbers, checkpoint)
    for task, measured in enumerate(rows_of_tasks, start=checkpoint.tasks):
        report.record_lanes(results, task, measured, lanes)
        now = time.monotonic()
        report.records.add_seconds(results, labels, now - since)
        since = now
        diverged = report.mark_diverged(results, task, lanes=lanes)
        if now - saved > SAVE_EVERY:
            kept.save()
            saved = time.monotonic()
        _tell(progress, lanes, task, measured, diverged)


def _labels_of(lanes: Sequence[training.Lane]) -> str:
    return ", ".join(dict.fromkeys(label for label, _ in lanes))


def _tell(
    progress: Progress | None,
    lanes: Sequence[training.Lane],
    task: int,
    measured: Mapping[str, np.ndarray],
    diverged: Sequence[tuple[str, int]],
) -> None:
    """Tells of a task that lanes have done, and of those that diverged in it."""
    for method, seed in diverged:
        if hasattr(progress, "diverged"):
            progress.diverged(method, seed, task)
        else:
            warnings.warn(diverged_text(method, seed, task), RuntimeWarning, stacklevel=2)
    if progress is None:
        return
    if hasattr(progress, "task_done"):
        for label in dict.fromkeys(label for label, _ in lanes):
            rows = [row for row, lane in enumerate(lanes) if lane[0] == label]
            progress.task_done(
                label, task, {name: _finite_mean(np.asarray(values)[rows]) for name, values in measured.items()}
            )
    progress(_labels_of(lanes), len(lanes), {name: _finite_mean(values) for name, values in measured.items()})


def diverged_text(method: str, seed: int, task: int) -> str:
    """What is said of a lane that diverges; `task` counts from 0, the text from 1."""
    return f"{method} diverged with seed {seed} in task {task + 1}: its loss is not finite; the other lanes go on"


def _finite_mean(values: np.ndarray) -> float:
    """Of the lanes that have a number."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(np.mean(finite)) if finite.size else math.nan


def _numbers(method: learners.Method, taken: set[str]) -> dict[str, float]:
    """A method's numbers, but for those whose name means something else in results, as `seed` of a user's function."""
    return {
        name: float(value)
        for name, value in {**method.hyperparameters, **method.options}.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in taken
    }


def _compiled_together(methods: Sequence[learners.Method]) -> list[list[learners.Method]]:
    """Methods of one learner that differ in their numbers alone run as lanes of one program."""
    groups: dict[Any, list[learners.Method]] = {}
    for method in methods:
        groups.setdefault((method.learner, tuple(sorted(method.options.items()))), []).append(method)
    return list(groups.values())
