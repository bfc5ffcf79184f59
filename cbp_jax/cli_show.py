"""Shows the results of a run."""

from pathlib import Path
from typing import Any


def show(
    results: Any,
    out: Path,
    formats: tuple[str, ...] = ("png",),
    experiment: Any = None,
    measures: list[str] | None = None,
) -> None:
    """Print the table of a run, and draw its pictures as its experiment defines them, or only these measures."""
    from cbp_jax import experiments, report
    from cbp_jax.experiments import learners

    results = learners.with_looks(results)
    experiment = experiment or experiments.EXPERIMENTS.get(results.attrs["experiment"], experiments.stream)
    print(experiment.summary(results))
    if measures is None:
        pictures = experiment.plot(results, out, formats)
    else:
        pictures = report.save_figures({"chosen": report.plot_tasks(results, measures=measures)}, out, formats)
    for picture in pictures:
        print(f"picture: {picture}")
