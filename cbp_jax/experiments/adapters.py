"""A sequence of text tasks, learned with adapters: one for all tasks, one for each, sparse ones, orthogonal ones.

Methods are those of `adapter_methods.METHODS`. Each adapter is a LoRA adapter (`cbp_jax.lora`), trained by Adam
together with a linear head. The encoder is frozen, except for "full". Tasks come in several orders, the first of which
is the given one.

Every task is tested after every later one. With a_ij the accuracy on task j after learning task i, of T tasks, the
table has

    average accuracy     the mean of a_Tj over all tasks j
    forgetting           the mean of max_i a_ij - a_Tj over all but the last, with i < T
    forward transfer     the mean of a_jj - b_j over all but the first, with b_j that of an adapter for the task alone

where b_j are those of the method "per_task" with the same head. Forgetting is that of Chaudhry et al. 2018, negative if
tasks become better, and forward transfer the opposite of their intransigence. For a task's change of the adapted
kernels it has the effective rank, the fraction of negligible entries, the overlap of the input subspaces of two tasks'
changes, and collisions: the number of weights among the largest changes of both tasks, divided by the number expected
by chance, so that 1 is chance.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from cbp_jax.experiments import adapter_reports, folder, memory, text_reports, texts
from cbp_jax.experiments.adapter_methods import METHODS, read_methods
from cbp_jax.experiments.adapter_trials import Trials
from cbp_jax.experiments.checks import check_counts, seeds_of
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.lanes import Job
from cbp_jax.experiments.progress import Progress, tell
from cbp_jax.training.lanes import one_blas_thread

NAME = "continual_lora"
# Methods that are also compared with one head over all classes.
SHARED = tuple(
    f"{name}:head=shared" for name in ("sequential", "per_task", "per_task_l1", "o_lora", "full", "replay", "joint")
)

MEASURES = {
    "loss": "mean loss of training on the task, without penalties",
    "rank": "effective rank of the task's change, mean over kernels",
    "sparsity": "fraction of the change's entries below a hundredth of the largest of their kernel",
}
# Measures with an additional axis for the position of another task.
PAIR_MEASURES = {
    "accuracy": "fraction of a task's test texts classified correctly, after this one or an earlier task",
    "overlap": "mean squared cosine between what this task's change reads and an earlier one's",
    "collisions": "weights among the largest changes of this task and an earlier one, over chance",
}


@dataclasses.dataclass(frozen=True)
class Settings(texts.TextSettings):
    """A sequence of text tasks, learned by adapters."""

    methods: tuple[str, ...] = (*METHODS, *SHARED)
    """Methods to compare, optionally with settings: "o_lora:form=squared,head=shared"."""
    orders: int = 3
    """Number of orders of the tasks: the given order and random ones; at most all different orders."""
    learning_rate: float = 5e-4
    """Peak learning rate of Adam for adapters and heads."""
    full_learning_rate: float = 5e-5
    """Peak learning rate of the encoder if all its weights are trained; its head keeps that of heads."""
    rank: int = 8
    """Rank of an adapter."""
    alpha: float = 16.0
    """Scale of adapters: the change of a kernel is alpha / rank times the product of its factors."""
    target_modules: tuple[str, ...] = ("query", "value")
    """Which kernels have adapters: patterns of names, as in `cbp_jax.lora.init`; "layer*" for all of every layer."""
    memory_texts: int = 100
    """Number of texts of each earlier task that the method "replay" keeps."""
    collision_density: float = 0.01
    """Fraction of the weights of adapted kernels, those of largest change, that count as changed in collisions."""


def check(settings: Settings) -> list[str]:
    """Check settings before anything is computed.

    Returns:
      labels of the methods.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    texts.check(settings)
    check_counts(settings, "orders", "rank", "memory_texts")
    numbers = ("learning_rate", "full_learning_rate", "alpha")
    texts.check_numbers(settings, **{name: getattr(settings, name) for name in numbers})
    if settings.alpha == 0:
        raise ValueError("alpha must be positive, got 0")
    if not 0 < settings.collision_density <= 1:
        raise ValueError(f"collision_density must be in (0, 1], got {settings.collision_density}")
    if not settings.target_modules:
        raise ValueError("target_modules must be one pattern or more, got none")
    methods = read_methods(settings.methods)
    for label, method in methods.items():
        if method.joint and settings.batch_size < len(settings.tasks):
            raise ValueError(
                f"method {label!r}: batch_size must be at least the number of tasks, {len(settings.tasks)}"
            )
    return list(methods)


def orders_of(tasks: int, orders: int) -> np.ndarray:
    """Return different orders of tasks, int [orders, tasks]. The first is the given one. Fewer orders are the first of
    more.

    >>> orders_of(3, 2).tolist(), len(orders_of(2, 9))
    ([[0, 1, 2], [2, 0, 1]], 2)
    """
    draw, found = np.random.default_rng(0), [tuple(range(tasks))]
    while len(found) < min(orders, math.factorial(tasks)):
        order = tuple(draw.permutation(tasks).tolist())
        if order not in found:
            found.append(order)
    return np.array(found)


def total(settings: Settings) -> int:
    """Return the total number of tasks to learn."""
    count = len(settings.tasks)
    return len(settings.methods) * min(settings.orders, math.factorial(count)) * settings.seeds * count


def job(settings: Settings) -> Job:
    """Prepare the experiment.

    Results are written as tasks end. In a resumed run, an unfinished method restarts from its first task. A seed
    diverges with a method if it does so in any of the orders.

    Args:
      settings: what to run.

    Returns:
      what runs it. Its results are `MEASURES` [method, order, seed, task], where a task is its position in the order,
      and `PAIR_MEASURES` with an additional dimension, the position of an earlier task.
      `sequence` [order, task] says which task is at which position.

    Raises:
      ValueError: a setting is out of range or unknown, before anything is computed.
    """
    from cbp_jax import report

    labels = check(settings)
    count = len(settings.tasks)
    methods, orders = read_methods(settings.methods), orders_of(count, settings.orders)
    memory.check_results(len(labels), settings.seeds * len(orders), count, len(MEASURES) + count * len(PAIR_MEASURES))
    prepared = texts.prepare(settings)

    def run(out: Path, progress: Progress | None = None) -> Any:
        empty = _empty_results(settings, labels, orders, prepared.name)
        with one_blas_thread(), folder.opened(empty, Path(out)) as results:
            report.save_results(results, out)
            trials = None
            for label, method in methods.items():
                # Of the measures, accuracies are always finite.
                if results.accuracy.loc[{"method": label}].isel(task=-1).notnull().all():
                    if progress is not None:
                        progress(label, len(orders) * settings.seeds * count, {})
                    continue
                lanes = [(label, seed) for _ in orders for seed in seeds_of(settings)]
                lap = report.records.stopwatch(results, [label])
                trials = trials or Trials(settings, prepared, orders)
                for task, measured in enumerate(trials.run(method)):
                    for name, values in measured.items():
                        where = {"method": label, "task": task}
                        if name in MEASURES:
                            results[name].loc[where] = values
                        else:
                            row = results[name].loc[where].values
                            row[..., : values.shape[-1]] = values
                            results[name].loc[where] = row
                    lap()
                    diverged = report.mark_diverged(results, task, [label])
                    report.save_results(results, out)
                    shown = {"accuracy": measured["accuracy"].mean(-1).ravel(), "loss": measured["loss"].ravel()}
                    tell(progress, lanes, task, shown, diverged, ~report.divergence.diverged_by(results, task, lanes))
        return results

    return run


def _empty_results(settings: Settings, labels: list[str], orders: np.ndarray, encoder: str) -> Any:
    from cbp_jax import report

    results = report.new_results(
        labels,
        [label.partition("(")[0] for label in labels],
        [{} for _ in labels],
        seeds=seeds_of(settings),
        tasks=len(settings.tasks),
        settings=settings,
        experiment=NAME,
        measures={"loss": MEASURES["loss"]},
    ).drop_vars("loss")
    dims = ("method", "order", "seed", "task")
    shape = (len(labels), len(orders), settings.seeds, len(settings.tasks))
    blank = lambda *more: np.full((*shape, *more), np.nan, np.float32)
    single = {name: (dims, blank(), {"long_name": meaning}) for name, meaning in MEASURES.items()}
    pairs = {
        name: ((*dims, "other"), blank(len(settings.tasks)), {"long_name": meaning})
        for name, meaning in PAIR_MEASURES.items()
    }
    names = np.array([text_reports.short(name) for name in settings.tasks])
    results = results.assign(single).assign(pairs)
    results = results.assign_coords(
        order=np.arange(len(orders)), other=np.arange(len(names)), sequence=(("order", "task"), names[orders])
    )
    return results.assign_attrs(encoder=encoder)


def _smoke() -> Settings:
    return Settings(
        seeds=2,
        orders=2,
        encoder=texts.FROM_NOTHING,
        width=16,
        vocabulary=300,
        length=16,
        train_texts=100,
        test_texts=50,
        steps=20,
        learning_rate=0.01,
        full_learning_rate=0.003,
        rank=2,
        target_modules=("layer*",),
        memory_texts=20,
        methods=("sequential", "per_task", "added_l1:l1=1e-3", "o_lora:head=shared", "full", "replay", "joint"),
    )


def _paper() -> Settings:
    return Settings(
        tasks=("glue/sst2", "glue/qnli", "glue/qqp", "glue/mrpc", "glue/mnli", "ag_news_subset"),
        encoder="roberta-large",
        length=128,
        train_texts=20_000,
        test_texts=2_000,
        batch_size=32,
        steps=2_000,
        learning_rate=3e-4,
        full_learning_rate=1e-5,
    )


continual_lora = Experiment(
    name=NAME,
    about="A sequence of text tasks with one adapter for all or for each; sparse or orthogonal adapters; replay.",
    Settings=Settings,
    presets={"smoke": _smoke, "laptop": Settings, "paper": _paper},
    check=check,
    total=total,
    plot=adapter_reports.plot,
    summary=adapter_reports.summary,
    job=job,
)
