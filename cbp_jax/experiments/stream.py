"""Experiments on streams of tasks: their settings, checks of settings, and training."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from cbp_jax import curvature, losses, nets, training
from cbp_jax.experiments import learners, memory
from cbp_jax.experiments.checks import (
    MOST_STEPS,
    check_counts,
    check_dataset,
    check_first_seed,
    check_hidden,
    check_lanes_at_once,
)
from cbp_jax.experiments.empty_results import Curve, empty_results, with_curves
from cbp_jax.experiments.lanes import Prepared, Train, prepare_methods, program_of
from cbp_jax.experiments.plan import Program
from cbp_jax.experiments.progress import Progress
from cbp_jax.problems import Problem


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
    """Number of examples in an update."""
    hidden: tuple[int, ...] = (100, 100, 100)
    """Sizes of the hidden layers, unless a method sets its own; no sizes make a linear network."""
    activation: str = "relu"
    """Activation of the hidden layers, unless a method sets its own."""
    measured_examples: int = 2000
    """Number of examples on which dead units and ranks are measured before each task; all of the task's, if it has
    fewer."""
    measure_every: int | None = None
    """Number of updates between measurements of plasticity and gradients; by default they are not measured."""
    lanes: Literal["auto", "vmap", "map"] = "auto"
    """How seeds run on one device: in parallel (vmap) or in turn (map); auto chooses by device."""


@dataclasses.dataclass(frozen=True)
class ImageStreamSettings(StreamSettings):
    """Settings of a stream of tasks made from a dataset."""

    network: str = "mlp"
    """One of mlp, convnet, lenet, resnet18 and vit, optionally with settings: "vit:depth=2,width=32"; or a Flax module:
    "my_module:MyNet(width=64)". Networks that do not accept images get flattened images."""
    dataset: str = "digits"
    """A name of `cbp_jax.data.names()` or of tensorflow-datasets, or the path of an array file (.npz)."""
    examples_per_task: int | None = None
    """Number of examples of each task; by default all of the dataset."""
    data_dir: Path | None = None
    """Folder of prepared datasets; by default that of tensorflow-datasets."""


def check(settings: StreamSettings) -> list[learners.Method]:
    """Check settings before anything is computed.

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
    methods = learners.read_methods(settings.methods, activation=settings.activation)
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


def total(settings: StreamSettings) -> int:
    """Return how many tasks all lanes have to do, for a progress bar."""
    return len(settings.methods) * settings.seeds * settings.tasks


def summary(results: Any) -> str:
    """Return the table of a run; see `report.summary`."""
    from cbp_jax import report

    return report.summary(results)


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw the pictures of a run; see `report.plot_run`."""
    from cbp_jax import report

    return report.plot_run(results, out, formats=formats)


def run(
    experiment: str, settings: StreamSettings, problem: Problem, out: Path, progress: Progress | None = None, **how: Any
) -> Any:
    """Run your own stream of tasks, as `Experiment.run` runs an experiment's.

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
) -> Prepared:
    """Check settings that depend on the stream of tasks, and make the learners.

    Args:
      experiment: its name.
      settings: what to run.
      methods: the methods to compare, as `check` returns them.
      problem: the stream.
      asked_for: names of settings that were given by the user. If they do not fit, an error is raised; others are
        adapted.
      train: used instead of `training.run_tasks`.
      measures: names and meanings of its measures; by default those of `report.stream_measures`.
      curves: its measures of a task at several points, by name.
      lanes_at_once: maximum number of lanes on the devices at once; by default all, or as many as fit into memory.
      processes: number of processes that share the lanes.
      **network: how to make the network, see `learners.make_learner`.

    Returns:
      a function of a folder and a progress callback, which runs it.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    from cbp_jax import report

    every, dormant_threshold = settings.measure_every, getattr(settings, "dormant_threshold", None)
    if every is not None and every > problem.steps_per_task:
        raise ValueError(f"measure_every must be at most the {problem.steps_per_task} updates of a task, got {every}")
    measured = _measured_examples(settings, problem, asked_for)
    measures = measures or report.stream_measures(
        accuracy="accuracy" in losses.LOSSES[problem.loss].metrics,
        updates=every is not None,
        test=problem.test is not None,
        dormant=dormant_threshold is not None,
    )
    numbers_each = len(measures) + sum(len(curve.points) for curve in (curves or {}).values())
    _check_size(settings, methods, problem, measured, numbers_each)
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
        if group[0].curvature:
            _check_curvature(learner, problem, group[0].text)
        run = lambda seeds, numbers, checkpoint, at_once: (train or training.run_tasks)(
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
            # Not every training function has this argument.
            **({} if at_once is None else {"lanes_at_once": at_once}),
        )
        return run, program

    empty = empty_results(experiment, settings, methods, settings.tasks, measures)
    return prepare_methods(with_curves(empty, curves or {}), methods, make, processes)


def _measured_examples(settings: StreamSettings, problem: Problem, asked_for: Collection[str]) -> int:
    """Return the number of examples to measure: that of the setting, or of a task's examples if these are fewer.

    Raises:
      ValueError: a task has fewer, and the setting was given by the user.
    """
    measured = settings.measured_examples
    if problem.examples is None or measured <= problem.examples:
        return measured
    if "measured_examples" in asked_for:
        raise ValueError(
            f"measured_examples must be at most the {problem.examples} examples that a task has, got {measured}"
        )
    return problem.examples


def _check_size(
    settings: StreamSettings, methods: Sequence[learners.Method], problem: Problem, measured: int, numbers_each: int
) -> None:
    """Raise a ValueError if updates cannot be counted, or if weights, examples or results do not fit into memory.

    Args:
      settings, methods, problem: those of the run.
      measured: number of examples for measurements.
      numbers_each: how many numbers are kept of each task of a lane.
    """
    if getattr(problem, "steps_per_task", 0) > MOST_STEPS:
        raise ValueError(
            f"a task must have at most {MOST_STEPS} updates, and has {problem.steps_per_task}; choose fewer "
            "examples or epochs, or a larger batch_size"
        )
    for sizes in {settings.hidden, *(method.hidden for method in methods if method.hidden is not None)}:
        memory.check_layers((math.prod(problem.input_shape), *sizes, problem.num_classes))
    memory.check_examples(measured, problem.input_shape)
    memory.check_results(len(methods), settings.seeds, settings.tasks, numbers_each)


def _size_of(data: Any) -> int:
    """Return the size of arrays in bytes."""
    return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(data))


def _check_curvature(learner: training.Learner, problem: Problem, method: str) -> None:
    """Raise a ValueError if a method needs the curvature of a network for which it cannot be computed."""

    def diagonal(data, key):
        x, y = problem.batch(data, problem.make_task(data, key, 0), 0)
        outputs_of = lambda params, x: learner.predict(params, x)[0]
        return curvature.hesscale(outputs_of, learner.init(key), x, y, problem.loss)[2]

    try:
        jax.eval_shape(diagonal, problem.data, jax.random.key(0))
    except ValueError as error:
        raise ValueError(f"method {method!r} needs the network's curvature: {error}") from error
