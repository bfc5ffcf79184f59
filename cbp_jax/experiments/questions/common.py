"""Shared code of the questions about learners: one stream of tasks, an equal search, tables and pictures.

The stream is Online Permuted images in a size where plain backpropagation loses half of its accuracy in minutes: 8x8
digits, 1,000 per task, one at a time, and three hidden layers of 50 units. In every question plain backpropagation and
every other method try 12 configurations on two seeds, and run on ten others.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.permuted import Online, online_permuted
from cbp_jax.experiments.tuning import Lane, Plan, TunedSettings, tuned_experiment
from cbp_jax.report.looks import BLACK, Look

# Plain backpropagation searches only its step size; the others search their step size and one more number.
BACKPROP = Lane(
    "bp",
    "bp",
    {"step_size": (3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 5e-3, 7e-3, 1e-2, 1.5e-2)},
    Look("Backprop", BLACK),
)
STEP_SIZES = (7e-3, 1.5e-2)


@dataclasses.dataclass(frozen=True)
class QuestionSettings(TunedSettings, Online):
    """A question about learners on Online Permuted images; `methods` are the names of the lanes to compare."""

    def plan(
        self,
        lanes: Sequence[Lane],
        experiment: Experiment = online_permuted,
        measures: Mapping[str, str] | None = None,
    ) -> Plan:
        """Return the comparison of the lanes named in `methods`.

        Args:
          lanes: all lanes of the question.
          experiment: the experiment that is run; its settings are among those of the question.
          measures: names and meanings of the measures to keep; by default those of all streams.

        Raises:
          ValueError: a method is not one of the lanes.
        """
        from cbp_jax import report

        by_name = {lane.name: lane for lane in lanes}
        if unknown := [name for name in self.methods if name not in by_name]:
            raise ValueError(f"methods must be some of {list(by_name)}, got {', '.join(map(repr, unknown))}")
        names = [field.name for field in dataclasses.fields(experiment.Settings)]
        reporting = experiment.Settings(**{name: getattr(self, name) for name in names})
        # Measures of units and weights do not affect the choice, and take time.
        seeds = {"seeds": self.tuning_seeds, "first_seed": self.first_tuning_seed}
        tuning = dataclasses.replace(reporting, **seeds, measured_examples=1, measure_every=None)
        measures = measures or report.stream_measures(updates=self.measure_every is not None)
        return Plan(experiment, tuple(by_name[name] for name in self.methods), tuning, reporting, measures)


def question(
    name: str,
    about: str,
    lanes: Callable[[], Sequence[Lane]],
    *,
    baselines: Sequence[str],
    tasks: int,
    measures: Sequence[str] = ("accuracy", "dead_units", "weight_magnitude", "effective_rank"),
) -> Experiment:
    """Return an experiment that compares learners on Online Permuted images.

    Args:
      name: name of the experiment.
      about: one line for lists.
      lanes: returns the lanes to compare.
      baselines: names of the lanes that the others are compared with.
      tasks: number of tasks of the preset "laptop".
      measures: measures to draw over tasks, and to show in the second table. If one is about the weights as matrices,
        presets measure the last update of each task, since these measures come with it.
    """

    def settings(dataset: str, examples_per_task: int, compared: int | None = None, **others: Any) -> QuestionSettings:
        matrices = any(name in ("weight_rank", "weight_effective_rank", "weight_sparsity") for name in measures)
        return QuestionSettings(
            methods=tuple(lane.name for lane in lanes()[:compared]),
            dataset=dataset,
            examples_per_task=examples_per_task,
            measure_every=examples_per_task if matrices else None,
            **others,
        )

    def smoke(dataset: str | None) -> QuestionSettings:
        few = {"seeds": 2, "tuning_seeds": 1, "tasks": 3, "measured_examples": 20}
        return settings(dataset or "digits", 20, compared=3, hidden=(8,), **few)

    def laptop(dataset: str | None) -> QuestionSettings:
        return settings(dataset or "digits", 1000, hidden=(50, 50, 50), seeds=10, tasks=tasks, measured_examples=500)

    def paper(dataset: str | None) -> QuestionSettings:
        return settings(dataset or "mnist", 10_000, hidden=(100, 100, 100), seeds=20, tasks=800)

    def summary(results: Any) -> str:
        from cbp_jax import report

        others = (*(name for name in measures if name not in ("accuracy", "loss")), "weight_rank")
        return report.comparison_table(results, baselines, others)

    def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
        from cbp_jax import report

        shown = _shown(results, baselines)
        figures = {"tasks": report.plot_tasks(results, methods=shown, measures=measures)}
        if results[measures[0]].notnull().all():
            figures = {"differences": report.plot_differences(results, baselines)} | figures
            figures["search"] = report.plot_search(results)
        return report.save_figures(figures, Path(out), formats)

    return tuned_experiment(
        lambda settings: settings.plan(lanes()),
        name=name,
        about=about,
        Settings=QuestionSettings,
        presets={"smoke": smoke, "laptop": laptop, "paper": paper},
        plot=plot,
        summary=summary,
    )


def _shown(results: Any, baselines: Sequence[str], most: int = 8) -> list[str]:
    """Return the methods whose lines are drawn: the baselines and the best others, at most `most`."""
    methods = results.method.values.tolist()
    first = [name for name in baselines if name in methods]
    mean = lambda name: float(results.accuracy.loc[{"method": name}].fillna(0).mean())
    others = sorted((name for name in methods if name not in first), key=mean, reverse=True)
    chosen = [*first, *others[: most - len(first)]]
    return [name for name in methods if name in chosen]
