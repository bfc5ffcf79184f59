"""Do adapters lose plasticity?

A network is first trained on a base task, the images as they are. Then it is frozen, and a long stream of tasks is
learned on top of it: the labels are permuted (`--stream labels`), or the pixels (`--stream pixels`). Methods are those
of `adapter_learners.LEARNERS`: one low-rank adapter (`cbp_jax.lora`) trained on all tasks; a fresh one for each task
(`adapter:reset=network`), with which the others are compared; continual backpropagation on the adapter's rank-one
components, which `discover_units` finds as units; and all weights, trained on all tasks or from the trained network
each time (`full:reset=network`). `l1` is an L1 penalty on the change. All methods of a seed start from the same
network.

`accuracy` is online: each example is classified before the network learns from it. Dead units and ranks of the
representation are those of the network's hidden units after a task, on examples of the next one (also if each task
starts from the trained network). The change since the trained network is the product of an adapter's factors, or the
difference of all weights. Its measures after each task are:

    change_rank           the effective rank, mean over kernels
    dormant_components    of an adapter, components whose norm is at most a tenth of the mean of their kernel's
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import cbp_jax
from cbp_jax import data, lora, metrics, nets, problems, report, training
from cbp_jax.experiments import learners, memory, stream
from cbp_jax.experiments.checks import check_counts, seeds_of
from cbp_jax.experiments.empty_results import empty_results
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.images import check_classes, gets_vectors
from cbp_jax.experiments.lanes import Job, Train, prepare_methods, program_of
from cbp_jax.experiments.plan import Program
from cbp_jax.experiments.questions import adapter_reports
from cbp_jax.experiments.questions.adapter_learners import LEARNERS, is_fresh, trains_adapter
from cbp_jax.lora.adapter import changes
from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.units import Units, leaves_by_path

NAME = "question_adapters"
MEASURES = {
    **report.stream_measures(),
    "change_rank": "effective rank of the change since the trained network, mean over kernels, after the task",
    "dormant_components": "fraction of an adapter's components of small norm, relative to their kernel's",
}
_SMALL = 0.1  # of the mean norm of a kernel's components
_BASE = "base/"  # prefix of the trained network's arrays among the inputs of lanes
_BASE_TASKS = 2**30  # folded into a seed's key for tasks, for the base task


@dataclasses.dataclass(frozen=True)
class Settings(stream.ImageStreamSettings):
    """Settings of adapters on a trained network, along a stream of tasks."""

    methods: tuple[str, ...] = ("adapter:reset=network", "adapter", "adapter_cbp", "full")
    """Methods to compare: names, optionally with settings: "adapter:step_size=0.003,l1=1e-4". One of them must be a
    fresh adapter for each task, "adapter:reset=network"."""
    stream: Literal["labels", "pixels"] = "labels"
    """What differs between tasks: names of the classes (labels), or places of the pixels (pixels)."""
    base_epochs: int = 20
    """Number of epochs over the base task, in which the network is trained before it is frozen."""
    base_learner: str = "adam:step_size=1e-3"
    """Learner of the base task, optionally with settings."""
    rank: int = 4
    """Rank of an adapter."""
    alpha: float = 8.0
    """The change of a kernel is alpha over rank times the product of its factors."""
    target_modules: tuple[str, ...] = ("*",)
    """Which kernels have adapters: patterns of names, as in `cbp_jax.lora.init`."""


class State(NamedTuple):
    """State needed to resume one lane."""

    train: training.TrainState  # of the adapter, or of all weights
    base: optax.Params  # of the trained network, constant


def _smoke(dataset: str | None) -> Settings:
    return Settings(
        dataset=dataset or "digits",
        methods=("adapter:reset=network", "adapter_cbp:replacement_rate=0.1,maturity_threshold=5"),
        seeds=2,
        tasks=4,
        examples_per_task=200,
        batch_size=10,
        measured_examples=100,
        hidden=(20, 10),
        base_epochs=2,
        rank=2,
    )


def _laptop(dataset: str | None) -> Settings:
    # Each learner's best of six settings over 200 tasks with seeds 1000 and 1001, by mean accuracy.
    return Settings(
        dataset=dataset or "digits",
        methods=(
            "adapter:step_size=0.02,reset=network",
            "adapter:step_size=0.003",
            "adapter:step_size=0.01,l1=1e-3",
            "adapter_cbp:step_size=0.01,replacement_rate=1e-2",
            "full:step_size=0.001",
            "full:step_size=0.01,l1=0.1",
            "full:step_size=0.01,reset=network",
            "full_cbp:step_size=0.01,replacement_rate=1e-2",
        ),
        seeds=10,
        first_seed=100,
        tasks=400,
        examples_per_task=1600,
        batch_size=8,
        measured_examples=500,
        hidden=(50, 50),
    )


def check(settings: Settings) -> list[learners.Method]:
    """Check settings before anything is computed.

    Returns:
      the methods.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    stream.check(dataclasses.replace(settings, methods=("bp",)))
    check_counts(settings, "base_epochs", "rank")
    check_scalar("alpha", settings.alpha, at_least=0)
    if not settings.alpha > 0:
        raise ValueError(f"alpha must be positive, got {settings.alpha}")
    if settings.measure_every is not None:
        raise ValueError(f"measure_every cannot be given for {NAME}, got {settings.measure_every}")
    if settings.stream not in ("labels", "pixels"):
        raise ValueError(f"stream must be 'labels' or 'pixels', got {settings.stream!r}")
    if not settings.target_modules:
        raise ValueError("target_modules must be one pattern or more, got none")
    (base,) = learners.read_methods([settings.base_learner], activation=settings.activation)
    if base.curvature or base.reset or base.network:
        raise ValueError(
            "base_learner must need no curvature, and have no reset and no settings of the network, got "
            f"{settings.base_learner!r}"
        )
    methods = learners.read_methods(settings.methods, activation=settings.activation, known=LEARNERS)
    for method in methods:
        if type(method) not in LEARNERS.values() or method.reset == "head" or method.network:
            raise ValueError(
                f"method {method.text!r} must be of {list(LEARNERS)}, with reset=network or none, and no settings of "
                "the network"
            )
    if not any(map(is_fresh, methods)):
        raise ValueError(
            "methods must have a fresh adapter for each task, which the others are compared with, as "
            f"'adapter:reset=network', got {settings.methods}"
        )
    return methods


def _problem(settings: Settings) -> problems.Problem:
    images = check_classes(data.load(settings.dataset, data_dir=settings.data_dir))
    make = {"labels": problems.label_permuted, "pixels": problems.online_permuted}[settings.stream]
    return make(
        images,
        examples_per_task=settings.examples_per_task or len(images),
        batch_size=settings.batch_size,
        flatten=gets_vectors(settings, images),
    )


def base_problem(settings: Settings, problem: problems.Problem) -> problems.Problem:
    """Return the base task: the unchanged examples, in another order each time."""

    def make_task(data: Any, key: chex.PRNGKey, index: chex.Numeric) -> Any:
        task = problem.make_task(data, jax.random.fold_in(key, _BASE_TASKS), index)
        name = {"labels": "labels", "pixels": "permutation"}[settings.stream]
        return task._replace(**{name: jnp.arange(len(getattr(task, name)), dtype=jnp.int32)})

    return dataclasses.replace(problem, make_task=make_task)


def job(settings: Settings) -> Job:
    """Prepare the experiment; networks are trained on the base task when it runs.

    Args:
      settings: what to run.

    Returns:
      a function that runs it. Its results are `MEASURES` [method, seed, task].

    Raises:
      ValueError: a setting is out of range or unknown, before anything is computed.
      cbp_jax.data.DatasetUnavailable: the dataset is not on this machine.
    """
    methods, problem = check(settings), _problem(settings)
    memory.check_layers((int(np.prod(problem.input_shape)), *settings.hidden, problem.num_classes))
    memory.check_results(len(methods), settings.seeds, settings.tasks, len(MEASURES))
    measured = min(settings.measured_examples, problem.examples)
    memory.check_examples(measured, problem.input_shape)
    base_methods = learners.read_methods([settings.base_learner])
    network = learners.make_learner(
        base_methods,
        settings.hidden,
        settings.activation,
        problem.input_shape,
        problem.num_classes,
        network=settings.network,
    )
    memory.check_states(network, base_methods, settings.seeds)
    if network.batch_stats:
        raise ValueError(f"network {settings.network!r}: its running statistics cannot be frozen")
    example = network.init(jax.random.key(0))
    adapter_of = lambda params, key: lora.init(
        params, key, rank=settings.rank, alpha=settings.alpha, target_modules=settings.target_modules
    )
    shape = jax.eval_shape(lambda key: adapter_of(example, key), jax.random.key(0))
    adapted = lambda adapter, x: network.predict(lora.apply(example, adapter), x)[0]
    units = cbp_jax.discover_units(adapted, shape, jnp.zeros((1, *problem.input_shape)), check=True)
    trained = functools.cache(lambda: train_base(settings, network, base_problem(settings, problem), base_methods[0]))

    def make(group: list[learners.Method]) -> tuple[Train, Program]:
        learner_on = functools.partial(on_base, group, network, units, adapter_of)

        def start(seed: chex.Array, values: dict[str, chex.Array]) -> State:
            leaves = [values[f"{_BASE}{path}"] for path in leaves_by_path(example)]
            base = jax.tree.unflatten(jax.tree.structure(example), leaves)
            numbers = {name: value for name, value in values.items() if not name.startswith(_BASE)}
            return State(training.init_state(learner_on(base), seed, numbers), base)

        def go_on(data: Any, state: State) -> tuple[State, dict[str, chex.Array]]:
            learner = learner_on(state.base)
            train, found = training.run_task(learner, problem, data, state.train, measured_examples=measured)
            return State(train, state.base), {**found, **change_measures(train.params, state.base)}

        def train(
            seeds: np.ndarray, numbers: dict[str, np.ndarray], checkpoint: Any, lanes_at_once: int | None
        ) -> Iterator[dict[str, Any]]:
            # Lanes are methods times seeds; each seed has its own network.
            rows = seeds - settings.first_seed
            bases = {f"{_BASE}{path}": leaf[rows] for path, leaf in leaves_by_path(trained()).items()}
            return training.run_lanes(
                start, go_on, problem.data, seeds, {**numbers, **bases}, settings.tasks, mode=settings.lanes,
                checkpoint=checkpoint, lanes_at_once=lanes_at_once,
            )  # fmt: skip

        return train, program_of(group, settings, None)

    empty = empty_results(NAME, settings, methods, settings.tasks, MEASURES)
    return prepare_methods(empty, methods, make)


def train_base(
    settings: Settings, network: training.Learner, problem: problems.Problem, method: learners.Method
) -> optax.Params:
    """Train a network on the base task for each seed, and return the parameters [seeds, ...]."""
    seeds = np.asarray(seeds_of(settings))
    numbers = {name: np.full(len(seeds), value, np.float32) for name, value in method.hyperparameters.items()}
    kept: list[training.TrainState] = []
    epochs = training.run_lanes(
        functools.partial(training.init_state, network),
        lambda data, state: training.run_task(network, problem, data, state, measured_examples=1),
        problem.data,
        seeds,
        numbers,
        settings.base_epochs,
        mode=settings.lanes,
        finish=kept.append,
    )
    for _ in epochs:
        pass
    return kept[0].params


def on_base(
    methods: Sequence[learners.Method], network: training.Learner, units: Units, adapter_of: Any, base: optax.Params
) -> training.Learner:
    """Return the learner of methods that differ only in numbers, on a trained network.

    Args:
      methods: methods of one learner with the same options.
      network: the learner of the network, whose functions are used.
      units: groups of the components of adapters.
      adapter_of: makes an adapter of the network's parameters and of a key.
      base: the trained network's parameters, which may be traced.
    """
    first = methods[0]
    if trains_adapter(first):
        init = functools.partial(adapter_of, base)
        components = cbp_jax.with_features(lambda adapter, x: network.predict(lora.apply(base, adapter), x)[0], units)
        learner = network._replace(
            init=init,
            predict=lambda adapter, x: network.predict(lora.apply(base, adapter), x),
            train=lambda adapter, x, key: components(adapter, x),
            optimizer=learners.make_optimizer(methods, units, {"kernel_init": nets.fan_in_uniform()}),
            units=units,
        )
    else:
        init = lambda key: base
        learner = network._replace(init=init, optimizer=learners.make_optimizer(methods, network.units, {}))

    def begin_task(tx, key, task, params, opt_state):
        fresh = training.restart("network", tx, params, opt_state, (), init(key))
        return jax.tree.map(lambda new, old: jnp.where(task == 0, old, new), fresh, (params, opt_state))

    return learner._replace(begin_task=begin_task if first.reset else None, scheduled=first.scheduled)


def change_measures(trained: Any, base: optax.Params) -> dict[str, chex.Array]:
    """Return measures of the change of a trained network.

    Args:
      trained: an adapter, or all weights.
      base: the trained network's parameters.

    Returns:
      scalars: `change_rank`, the effective rank of the change of a kernel as a matrix [in, out], mean over kernels; and
      `dormant_components`, the fraction of an adapter's components whose norm (that of a column of A times that of the
      row of B) is at most a tenth of the mean over their kernel. All components of an unchanged kernel are dormant. The
      fraction is NaN if all weights are trained.
    """
    matrix = lambda kernel: kernel.reshape(-1, kernel.shape[-1])
    if not isinstance(trained, lora.Adapter):
        after = leaves_by_path(trained)
        kernels = [after[path] - leaf for path, leaf in leaves_by_path(base).items() if leaf.ndim >= 2]
        dormant = jnp.float32(jnp.nan)
    else:
        kernels, scores = list(changes(trained).values()), []
        for factors in trained.factors.values():
            a, b = factors["lora_A"], factors["lora_B"]
            norms = jnp.linalg.norm(a.reshape(-1, a.shape[-1]), axis=0) * jnp.linalg.norm(
                b.reshape(b.shape[0], -1), axis=1
            )
            scores.append(norms <= _SMALL * jnp.mean(norms))
        dormant = jnp.mean(jnp.concatenate(scores), dtype=jnp.float32)
    ranks = [metrics.effective_rank(matrix(change)) for change in kernels]
    return {"change_rank": sum(ranks) / len(ranks), "dormant_components": dormant}


question_adapters = Experiment(
    name=NAME,
    about="Do adapters lose plasticity? One adapter for all tasks, fresh ones, replaced components, and all weights.",
    Settings=Settings,
    presets={"smoke": _smoke, "laptop": _laptop},
    check=check,
    plot=adapter_reports.plot,
    summary=adapter_reports.summary,
    job=job,
)
