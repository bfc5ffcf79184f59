"""Shows the results of a run."""

from pathlib import Path
from typing import Any


def show(results: Any, out: Path, formats: tuple[str, ...] = ("png",), experiment: Any = None) -> None:
    """Prints the table of a run and draws its pictures, as its experiment defines them."""
    from cbp_jax import experiments
    from cbp_jax.experiments import learners

    results = learners.with_looks(results)
    experiment = experiment or experiments.EXPERIMENTS.get(results.attrs["experiment"], experiments.stream)
    print(experiment.summary(results))
    for picture in experiment.plot(results, out, formats):
        print(f"picture: {picture}")
