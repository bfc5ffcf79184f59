import types

import numpy as np
import pytest

from cbp_jax import report, training


@pytest.fixture
def trained(monkeypatch):
    """Replace training by a function that records its arguments for each group and yields results of ones."""
    groups = []

    def run_tasks(learner, problem, seeds, hyperparameters, tasks, *, checkpoint, measure_every, **settings):
        given = {"seeds": seeds, "hyperparameters": hyperparameters, "tasks": tasks, "measure_every": measure_every}
        groups.append(types.SimpleNamespace(learner=learner, problem=problem, **given, **settings))
        names = report.stream_measures(
            accuracy=problem.loss == "softmax_cross_entropy", updates=measure_every is not None
        )
        for _ in range(tasks):
            yield {name: np.ones(len(seeds)) for name in names}

    monkeypatch.setattr(training, "run_tasks", run_tasks)
    return groups
