"""Results of every kind of experiment record the seconds of each method, and a resumed run adds to them."""

import dataclasses
import json
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import cbp_jax
from cbp_jax import report, training
from cbp_jax.experiments import EXPERIMENTS, adapters, dominance, lanes, lottery, quality, texts
from cbp_jax.report import records


class Work:
    """A clock, and a task that takes one second and may be interrupted."""

    def __init__(self):
        self.now, self.done, self.interrupted_in = 0.0, 0, None

    def monotonic(self):
        return self.now

    def task(self):
        self.now, self.done = self.now + 1.0, self.done + 1
        if self.done == self.interrupted_in:
            raise KeyboardInterrupt


# Each of these replaces the training of one kind of experiment by tasks of one second.


def of_lanes(patch, work):
    def run_tasks(learner, problem, seeds, numbers, tasks, *, checkpoint, measure_every, **_):
        done = checkpoint.restore({"done": np.zeros(len(seeds))})
        names = report.stream_measures(updates=measure_every is not None)
        for task in range(checkpoint.tasks, tasks):
            work.task()
            yield {name: np.ones(len(seeds)) for name in names}
            checkpoint.save(task + 1, lambda: done)

    patch.setattr(training, "run_tasks", run_tasks)
    patch.setattr(lanes, "CHECKPOINT_EVERY", 0.0)


def of_tickets(patch, work):
    def run_lanes(start, go_on, data, seeds, numbers, tasks, *, checkpoint, **_):
        kinds, evaluations = len(lottery.KINDS), 3
        done = checkpoint.restore({"done": np.zeros(len(seeds))})
        for task in range(checkpoint.tasks, tasks):
            work.task()
            yield {name: np.ones((len(seeds), kinds)) for name in lottery.MEASURES} | {
                name: np.ones((len(seeds), kinds, evaluations)) for name in lottery.CURVES
            }
            checkpoint.save(task + 1, lambda: done)

    patch.setattr(lottery.training, "run_lanes", run_lanes)


def of_texts(module, measures):
    def replace(patch, work):
        class Trials:
            def __init__(self, settings, *_):
                self.tasks = len(settings.tasks)

            def run(self, method):
                for _ in range(self.tasks):
                    work.task()
                    yield dict.fromkeys(measures, np.ones(2))

        patch.setattr(module, "Trials", Trials)
        patch.setattr(texts, "prepare", lambda settings: types.SimpleNamespace(name="none"))

    return replace


def of_utilities(patch, work):
    def measurements(settings, activation):
        for _ in range(settings.steps // settings.measure_every):
            work.task()
            yield np.ones(2), np.ones((2, 2, 2, 6))

    patch.setattr(quality, "_measurements", measurements)


class Row(NamedTuple):
    """An experiment of one kind.

    Attributes:
      name: of the experiment.
      changes: of its settings for "smoke".
      replace: replaces its training.
      interrupted_in: the task in which a first run is interrupted.
      then: for each method, the seconds recorded by then, without those of the interrupted task.
      finally_: and when the resumed run has ended.
    """

    name: str
    changes: dict[str, Any]
    replace: Callable[[Any, Work], None]
    interrupted_in: int
    then: tuple[float, ...]
    finally_: tuple[float, ...]


TEXTS = {"dominant": of_texts(dominance, dominance.MEASURES), "lora": of_texts(adapters, ("loss", "accuracy"))}
TABLE = (
    # Two methods share a program, and a resumed run goes on from its last task.
    Row("online_permuted", {"methods": ("bp:step_size=0.1", "bp:step_size=0.2", "cbp"), "tasks": 3}, of_lanes, 5,
        (1.5, 1.5, 1), (1.5, 1.5, 3)),
    # Two tasks of each method in the search, and two in the reported run.
    Row("question_penalty", {"methods": ("bp", "l2"), "tasks": 2}, of_lanes, 6, (3, 2), (4, 4)),
    # All kinds of networks share a program.
    Row("lottery_tickets", {"rounds": 11}, of_tickets, 7, (1,) * 6, (2,) * 6),
    # A resumed run starts again with the unfinished method.
    Row("dominant_tickets", {}, TEXTS["dominant"], 4, (2, 1, 0), (2, 3, 2)),
    Row("continual_lora", {"methods": ("full", "joint"), "orders": 1}, TEXTS["lora"], 4, (2, 1), (2, 3)),
    Row("utility_quality", {"activations": ("tanh", "relu")}, of_utilities, 7, (4, 2), (4, 6)),
)  # fmt: skip
# Modules whose experiments run as lanes, like online_permuted.
OF_LANES = {"agents", "collapse", "games", "questions.adapters", "streaming"}


def kind(experiment):
    """Return the module that runs an experiment; None for streams."""
    job = getattr(experiment.job, "func", experiment.job)
    return job and job.__module__.removeprefix("cbp_jax.experiments.")


def test_the_table_has_every_kind_of_experiment():
    assert {kind(experiment) for experiment in EXPERIMENTS.values()} - OF_LANES == {
        kind(EXPERIMENTS[row.name]) for row in TABLE
    }


# A run of `question_penalty` compiles for ten seconds.
SIMILAR = {"question_penalty", "lottery_tickets", "continual_lora"}  # run like others, and take longer


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] * (row.name in SIMILAR)) for row in TABLE],
    ids=lambda row: row.name,
)
def test_results_record_the_seconds_of_each_method_and_resumed_runs_add_to_them(row, tmp_path, monkeypatch):
    experiment, work = EXPERIMENTS[row.name], Work()
    settings = dataclasses.replace(experiment.preset("smoke"), **row.changes)
    monkeypatch.setattr(records, "time", work)
    row.replace(monkeypatch, work)

    def recorded():
        results = cbp_jax.load_results(tmp_path)
        seconds = records.seconds_of(results)
        return [seconds.get(method, 0) for method in results.method.values.tolist()]

    work.interrupted_in = row.interrupted_in
    with pytest.raises(KeyboardInterrupt):
        experiment.run(settings, tmp_path)
    assert recorded() == pytest.approx(row.then)
    for again in ("resumed", "finished"):  # a finished run stays as it is
        monkeypatch.setattr(sys, "argv", ["/bin/cbp-jax", again])
        results = experiment.run(settings, tmp_path)
        assert recorded() == pytest.approx(row.finally_)
        assert results.identical(cbp_jax.load_results(tmp_path))
        assert [entry["command"] for entry in json.loads(results.attrs["resumed"])] == ["cbp-jax resumed"]
