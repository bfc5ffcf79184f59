"""Dominant winning tickets in a pre-trained encoder (Gong et al., Findings of ACL 2022).

An encoder is fine-tuned on each task by itself, with a pull of L1 toward its initial weights: Adam, and behind it a
proximal step (`cbp_jax.proximal_l1_init`), so that weights which need not move come back exactly. A strength of s takes
s times the learning rate off every change in every step, where Adam moves a weight by about the learning rate at most:
strengths are between 0 and 1. Heads are not pulled, and belong to no ticket.

Then all but a ticket's changes are taken back (`tickets.transplant`), the head being as it was tuned: the weights of
largest change, for each of some densities, and the k rows and columns of largest change in each matrix. For densities
in `retrained` the ticket alone is trained from the start instead, which takes as long as fine-tuning. What is kept is
judged between the frozen encoder with a linear probe and the network that was fine-tuned.

Tasks' tickets of one density, seed and strength are compared in pairs: the weights that both have, over what chance
would have them share, for tickets of this size in each matrix, and for tickets with as many in each row and column.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cbp_jax.experiments import folder, memory, text_reports, texts
from cbp_jax.experiments.checks import seeds_of
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.lanes import Job
from cbp_jax.experiments.progress import Progress, tell
from cbp_jax.experiments.ticket_trials import Trials
from cbp_jax.training.lanes import one_blas_thread

NAME = "dominant_tickets"
PROBE = "probe"

MEASURES = {
    "accuracy": "fraction of the task's test texts classified correctly, after fine-tuning",
    "loss": "mean loss of training",
    "changed": "fraction of the encoder's weights that are not what they were",
}
# Besides, of tickets; with the dimension that numbers them.
TICKET_MEASURES = {
    "ticket_accuracy": ("density", "accuracy with only the changes of the largest weights"),
    "retrained_accuracy": ("density", "accuracy where only these weights were trained from the start"),
    "dimension_accuracy": ("dimensions", "accuracy with only the changes of this number of dimensions of each matrix"),
    "dimension_density": ("dimensions", "fraction of the weights in this number of dimensions of each matrix"),
    "shared": ("other", "weights in both tasks' tickets"),
    "by_size": ("other", "weights that tickets of their sizes in each matrix share by chance"),
    "by_marginals": ("other", "weights that tickets with as many in each row and column share by chance"),
    "jaccard": ("other", "weights in both tasks' tickets over those in either"),
}


@dataclasses.dataclass(frozen=True)
class Settings(texts.TextSettings):
    """Dominant winning tickets of an encoder that is fine-tuned, task by task."""

    strengths: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Strengths of the L1 pull toward the initial weights, relative to the learning rate. Each is a method."""
    learning_rate: float = 1e-4
    """Peak learning rate of Adam."""
    probe_learning_rate: float = 0.01
    """Learning rate of Adam for the linear probe of the frozen encoder."""
    densities: tuple[float, ...] = (0.5, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0005, 0.0001)
    """Densities of tickets."""
    retrained: tuple[float, ...] = ()
    """Densities of tickets that are also trained alone from the start; a subset of the densities."""
    dimensions: tuple[int, ...] = (128, 64, 32, 16, 8, 4, 2, 1)
    """Numbers of dimensions of each matrix to keep."""
    axis: Literal["row", "column", "both"] = "both"
    """Which dimensions: inputs of a matrix (row), outputs (column), or both."""
    compared: float = 0.01
    """Density of the tickets to compare between tasks."""


def check(settings: Settings) -> list[str]:
    """Check settings before anything is computed.

    Returns:
      the methods: the probe, and one for each strength.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    texts.check(settings)
    for name in ("strengths", "densities", "dimensions", "retrained"):
        values = getattr(settings, name)
        if len(set(values)) < len(values) or (not values and name != "retrained"):
            raise ValueError(f"{name} must be at least one and all different, got {values}")
    numbers = ("strengths", "learning_rate", "probe_learning_rate")
    texts.check_numbers(settings, **{name: getattr(settings, name) for name in numbers})
    for name in ("densities", "retrained"):
        if not all(0 < density <= 1 for density in getattr(settings, name)):
            raise ValueError(f"{name} must be in (0, 1], got {getattr(settings, name)}")
    if not 0 < settings.compared <= 1:
        raise ValueError(f"compared must be in (0, 1], got {settings.compared}")
    if min(settings.dimensions) < 1:
        raise ValueError(f"dimensions must be at least 1, got {settings.dimensions}")
    if unknown := set(settings.retrained) - set(settings.densities):
        raise ValueError(f"retrained must be some of the densities {settings.densities}, got {tuple(unknown)}")
    if settings.axis not in ("row", "column", "both"):
        raise ValueError(f"axis must be 'row', 'column' or 'both', got {settings.axis!r}")
    return [PROBE, *(_label(strength) for strength in settings.strengths)]


def _label(strength: float) -> str:
    return f"l1={strength:g}"


def total(settings: Settings) -> int:
    """Return the total number of trainings, including the probe's head."""
    return (1 + len(settings.strengths)) * settings.seeds * len(settings.tasks)


def job(settings: Settings) -> Job:
    """Prepare the experiment.

    Results are written as tasks end. In a resumed run, an unfinished method restarts from its first task, because its
    tickets are not saved.

    Args:
      settings: what to run.

    Returns:
      what runs it. Its results are `MEASURES` [method, seed, task], and `TICKET_MEASURES` with one dimension more;
      methods are "probe" and the strengths.

    Raises:
      ValueError: a setting is out of range or unknown, before anything is computed.
    """
    from cbp_jax import report

    methods = check(settings)
    each = len(MEASURES) + sum(len(_coordinate(settings, dim)) for dim, _ in TICKET_MEASURES.values())
    memory.check_results(len(methods), settings.seeds, len(settings.tasks), each)
    prepared = texts.prepare(settings)

    def run(out: Path, progress: Progress | None = None) -> Any:
        empty = _empty_results(settings, methods, prepared.name)
        with one_blas_thread(), folder.opened(empty, Path(out)) as results:
            report.save_results(results, out)
            trials = None
            for method, strength in zip(methods, (None, *settings.strengths), strict=True):
                if results.accuracy.loc[{"method": method}].notnull().all():
                    if progress is not None:
                        progress(method, settings.seeds * len(settings.tasks), {})
                    continue
                lanes = [(method, seed) for seed in seeds_of(settings)]
                lap = report.records.stopwatch(results, [method])
                trials = trials or Trials(settings, prepared)
                for task, measured in enumerate(trials.run(strength)):
                    _record(results, method, task, measured)
                    lap()
                    diverged = report.mark_diverged(results, task, [method])
                    report.save_results(results, out)
                    shown = {name: measured[name] for name in MEASURES if name in measured}
                    tell(progress, lanes, task, shown, diverged, ~report.divergence.diverged_by(results, task, lanes))
        return results

    return run


def _coordinate(settings: Settings, dim: str) -> Sequence[Any]:
    return settings.tasks if dim == "other" else {"density": settings.densities, "dimensions": settings.dimensions}[dim]


def _empty_results(settings: Settings, methods: list[str], encoder: str) -> Any:
    from cbp_jax import report

    results = report.new_results(
        methods,
        methods,
        [{}, *({"strength": strength} for strength in settings.strengths)],
        seeds=seeds_of(settings),
        tasks=len(settings.tasks),
        settings=settings,
        experiment=NAME,
        measures=MEASURES,
    )
    shape = (len(methods), settings.seeds, len(settings.tasks))
    extra = {
        name: (
            ("method", "seed", "task", dim),
            np.full((*shape, len(_coordinate(settings, dim))), np.nan, np.float32),
            {"long_name": meaning},
        )
        for name, (dim, meaning) in TICKET_MEASURES.items()
    }
    names = [text_reports.short(name) for name in settings.tasks]
    coordinates = {"density": list(settings.densities), "dimensions": list(settings.dimensions)}
    results = results.assign(extra).assign_coords(**coordinates, other=names, name=("task", names))
    return results.assign_attrs(encoder=encoder)


def _record(results: Any, method: str, task: int, measured: dict[str, np.ndarray]) -> None:
    """Write measurements, [seeds, ...]; overlaps [seeds, earlier tasks] are written for both tasks."""
    for name, values in measured.items():
        if TICKET_MEASURES.get(name, ("",))[0] != "other":
            results[name].loc[{"method": method, "task": task}] = values
            continue
        earlier = values.shape[1]
        row = results[name].loc[{"method": method}].transpose("task", "other", "seed").values
        row[task, :earlier], row[:earlier, task] = values.T, values.T
        results[name].loc[{"method": method}] = row.transpose(2, 0, 1)


def _smoke() -> Settings:
    return Settings(
        seeds=2,
        encoder=texts.FROM_NOTHING,
        width=16,
        vocabulary=300,
        length=16,
        train_texts=100,
        test_texts=50,
        steps=20,
        learning_rate=0.003,
        strengths=(0.0, 0.3),
        densities=(0.5, 0.1),
        retrained=(0.1,),
        dimensions=(4, 1),
    )


def _paper() -> Settings:
    return Settings(
        tasks=("glue/mnli", "glue/qnli", "glue/qqp", "glue/sst2", "glue/mrpc", "glue/cola", "glue/rte"),
        encoder="roberta-large",
        length=128,
        train_texts=400_000,
        test_texts=50_000,
        batch_size=32,
        steps=30_000,
        learning_rate=1e-5,
        retrained=(0.01, 0.0005),
    )


dominant_tickets = Experiment(
    name=NAME,
    about="How few of an encoder's weights a task has to change, and whether tasks share them (Gong et al., 2022).",
    Settings=Settings,
    presets={"smoke": _smoke, "laptop": Settings, "paper": _paper},
    check=check,
    total=total,
    plot=text_reports.plot_tickets,
    summary=text_reports.summary_of_tickets,
    job=job,
)
