"""Which rank predicts forgetting or plasticity: that of a task's weight change, or that of the representation?

All learners run on one Online Permuted stream, each at its best settings. After each task two quantities of the change
are measured, for every kernel as a matrix [in, out], and averaged over kernels:

    change_rank    the stable rank of the weights' change in the task, over the smaller side of the kernel
    overlap        the mean squared cosine between the input directions that this change reads and those that the
                   changes of the last few tasks read; a change reads its first left singular vectors

`earlier_accuracy` is the accuracy on the last few tasks; `forgetting` is how much lower it is than right after each of
these tasks was learned. Plasticity is the online accuracy on the next task. The rank of the
representation, `effective_rank` and `stable_rank`, is measured before each task, as in all streams.

The report has rank correlations over learners (for each seed, from means over the second half of the tasks) and within
a learner (over its tasks, averaged over learners). The latter are also given without linear trends, since everything
drifts from task to task. Intervals are bootstrapped over seeds.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import metrics, report, training
from cbp_jax.experiments import learners, permuted, stream
from cbp_jax.experiments.checks import check_counts
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.questions import penalties, rank_reports
from cbp_jax.experiments.questions.common import BACKPROP, STEP_SIZES, QuestionSettings
from cbp_jax.experiments.questions.utilities import RATES
from cbp_jax.experiments.tuning import Lane, Plan, tuned_experiment
from cbp_jax.problems import Problem
from cbp_jax.training.learner import stream_keys
from cbp_jax.training.step import evaluate
from cbp_jax.units import leaves_by_path

MEASURES = {
    "change_rank": "stable rank of the weights' change in the task over the largest possible, mean over kernels",
    "overlap": "mean squared cosine between what this task's change reads and earlier ones', mean over kernels",
    "learned_accuracy": "fraction of the task's examples classified correctly right after it",
    "earlier_accuracy": "fraction of earlier tasks' examples classified correctly after this task",
    "forgetting": "how much less that is than right after each of them",
}


_FINE = BACKPROP.space["step_size"]  # of methods that search only their step size


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Settings of the measures about earlier tasks."""

    earlier: int = 3
    """Number of preceding tasks that count as earlier ones, for forgetting and overlap."""
    subspace: int = 5
    """Number of directions of the input that count as read by a change, the first ones."""


@dataclasses.dataclass(frozen=True)
class StreamSettings(Earlier, permuted.Online):
    """Learners on an Online Permuted stream, with ranks and forgetting."""


@dataclasses.dataclass(frozen=True)
class Settings(Earlier, QuestionSettings):
    """Ranks, forgetting and plasticity of learners on an Online Permuted stream, each at its best settings."""


def lanes() -> list[Lane]:
    """Return a lane for each kind of learner of permuted streams, with 12 configurations each."""
    decays = {"step_size": STEP_SIZES, "l2": (1e-3, 3e-3, 1e-2), "noise": (2e-4, 2e-3)}
    perturbed = {"step_size": STEP_SIZES, "weight_decay": (1e-3, 1e-2), "sigma": (1e-3, 1e-2, 1e-1)}
    of_penalties = [lane for lane in penalties.lanes() if lane.name in ("l2", "l1", "l2_init", "l1_init")]
    others = {
        "adam": {"step_size": tuple(step / 10 for step in _FINE)},
        "shrink_and_perturb": decays,
        "upgd": perturbed,
        "dropout": {"step_size": STEP_SIZES, "dropout_rate": (0.01, 0.03, 0.05, 0.1, 0.2, 0.3)},
        "layer_norm": {"step_size": _FINE},
        "online_norm": {"step_size": _FINE},
        "crelu": {"step_size": _FINE},
        "redo": {"step_size": STEP_SIZES, "threshold": (0.01, 0.03, 0.1), "every": (1e3, 1e4)},
        "cbp": {"step_size": STEP_SIZES, "replacement_rate": RATES},
    }
    # Pictures use the names of all other experiments; there are too many learners for separate colors.
    of_others = [
        Lane(name, name, space, learners.parse_method(name).look._replace(style=None)) for name, space in others.items()
    ]
    return [BACKPROP, *of_penalties, *of_others]


class State(NamedTuple):
    """State needed to resume one lane. Earlier tasks are listed from the latest to the oldest."""

    train: training.TrainState
    reads: dict[str, chex.Array]  # by kernel, [earlier, in, directions]
    learned: chex.Array  # [earlier], accuracies right after each


def _smoke(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or "digits",
        methods=("bp", "l2", "cbp"),
        seeds=2,
        tuning_seeds=1,
        tasks=5,
        examples_per_task=150,
        measured_examples=100,
        hidden=(20, 10),
        earlier=2,
    )


def _laptop(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or "digits",
        methods=tuple(lane.name for lane in lanes()),
        seeds=10,
        tasks=300,
        examples_per_task=1000,
        measured_examples=500,
        hidden=(50, 50, 50),
    )


def check(settings: StreamSettings) -> list[learners.Method]:
    """Check settings before anything is computed.

    Returns:
      the methods.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    methods = stream.check(settings)
    check_counts(settings, "earlier", "subspace")
    if settings.earlier >= settings.tasks:
        raise ValueError(f"earlier must be less than tasks = {settings.tasks}, got {settings.earlier}")
    return methods


def _train(settings: StreamSettings) -> Callable[..., Iterator[dict[str, Any]]]:
    """Return a function that trains on a stream, and also measures each task's change and the accuracy on earlier
    tasks."""

    def train(
        learner: training.Learner,
        problem: Problem,
        seeds: chex.Array,
        hyperparameters: dict[str, chex.Array],
        tasks: int,
        *,
        mode: str,
        checkpoint: training.Checkpoint,
        lanes_at_once: int | None = None,
        **measuring: Any,
    ) -> Iterator[dict[str, Any]]:
        start = functools.partial(init_state, learner, settings.earlier, settings.subspace)
        go_on = functools.partial(run_task, learner, problem, **measuring)
        return training.run_lanes(
            start,
            go_on,
            problem.data,
            seeds,
            hyperparameters,
            tasks,
            mode=mode,
            checkpoint=checkpoint,
            lanes_at_once=lanes_at_once,
        )

    return train


def init_state(
    learner: training.Learner, earlier: int, subspace: int, seed: chex.Array, hyperparameters: dict[str, chex.Array]
) -> State:
    """Return the state of one lane before its first task."""
    train = training.init_state(learner, seed, hyperparameters)
    reads = {
        path: jnp.zeros((earlier, matrix.shape[0], min(subspace, *matrix.shape)))
        for path, matrix in _matrices(learner, train.params).items()
    }
    return State(train, reads, jnp.full(earlier, jnp.nan))


def run_task(
    learner: training.Learner, problem: Problem, data: Any, state: State, *, measured_examples: int, **measuring: Any
) -> tuple[State, dict[str, chex.Array]]:
    """Train one lane on its next task, and measure the task's change and the accuracy on earlier tasks.

    Args:
      learner: the learner to train.
      problem: the stream.
      data: data of the problem.
      state: state of the lane.
      measured_examples: number of examples of a task to measure on, also for accuracies after it.
      **measuring: as in `training.run_task`.

    Returns:
      the state after the task, and scalars: those of `training.run_task`, and `MEASURES`. Measures about earlier tasks
      are NaN if there are fewer of these.
    """
    earlier, keys = len(state.learned), stream_keys(state.train.key)
    after, measures = training.run_task(
        learner, problem, data, state.train, measured_examples=measured_examples, **measuring
    )

    def accuracy(index: chex.Array) -> chex.Array:
        task = problem.make_task(data, keys.problem, index)
        batch = problem.evaluation(data, task, measured_examples)
        return evaluate(learner, problem.loss, after.params, batch)["accuracy"]

    tasks = state.train.task - jnp.arange(earlier + 1)  # this task, and earlier ones
    accuracies = jax.lax.map(accuracy, jnp.maximum(tasks, 0))
    # Measured only with all requested earlier tasks, because fewer are forgotten less.
    of_earlier = lambda values: jnp.where(tasks[-1] >= 0, jnp.mean(values), jnp.nan)

    change = jax.tree.map(jnp.subtract, after.params, state.train.params)
    ranks, overlaps, reads = [], [], {}
    for path, matrix in _matrices(learner, change).items():
        ranks.append(metrics.stable_rank(matrix) / min(matrix.shape))
        new = read_directions(matrix, state.reads[path].shape[-1])
        overlaps.append(jax.vmap(lambda old, new=new: subspace_overlap(new, old))(state.reads[path]))
        reads[path] = jnp.concatenate([new[None], state.reads[path][:-1]])
    measures |= {
        "change_rank": sum(ranks) / len(ranks),
        "overlap": of_earlier(sum(overlaps) / len(overlaps)),
        "learned_accuracy": accuracies[0],
        "earlier_accuracy": of_earlier(accuracies[1:]),
        "forgetting": of_earlier(state.learned - accuracies[1:]),
    }
    learned = jnp.concatenate([accuracies[:1], state.learned[:-1]])
    return State(after, reads, learned), measures


def read_directions(change: chex.Array, count: int) -> chex.Array:
    """Return the directions of the input that a change reads most, orthonormal columns [in, count].

    Args:
      change: change of a kernel, [in, out].
      count: number of directions, at most the smaller side of the kernel.
    """
    return jnp.linalg.svd(change, full_matrices=False)[0][:, :count]


def subspace_overlap(a: chex.Array, b: chex.Array) -> chex.Array:
    """Return the mean squared cosine of the principal angles between two subspaces.

    It is in [0, 1], and by chance `directions / in`.

    Args:
      a: orthonormal columns [in, directions].
      b: orthonormal columns of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> float(subspace_overlap(jnp.eye(4)[:, :2], jnp.eye(4)[:, 1:3]))
      0.5
    """
    return jnp.sum(jnp.square(jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST))) / a.shape[1]


def _matrices(learner: training.Learner, params: optax.Params) -> dict[str, chex.Array]:
    """Return the kernels of a network as matrices [in, out], by path."""
    leaves = leaves_by_path(params)
    return {path: leaves[path].reshape(-1, leaves[path].shape[-1]) for path in learner.units.kernels}


measured_stream = Experiment(
    name="measured_stream",
    about="Learners on Online Permuted images, with ranks of what each task changes, and forgetting.",
    Settings=StreamSettings,
    presets={},
    problem=permuted.online_permuted.problem,
    network=permuted.online_permuted.network,
    train=_train,
    measures=lambda settings: _measures(settings),
    check=check,
    plot=rank_reports.plot,
    summary=rank_reports.summary,
)


def _measures(settings: Any) -> dict[str, str]:
    return {**report.stream_measures(updates=settings.measure_every is not None), **MEASURES}


def plan(settings: Settings) -> Plan:
    """Return the comparison of the methods that the settings name."""
    return settings.plan(lanes(), measured_stream, _measures(settings))


question_rank = tuned_experiment(
    plan,
    name="question_rank",
    about="Which rank predicts forgetting or plasticity, that of weight changes or that of representations?",
    Settings=Settings,
    presets={"smoke": _smoke, "laptop": _laptop},
    plot=rank_reports.plot,
    summary=rank_reports.summary,
)
