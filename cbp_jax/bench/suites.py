"""Benchmark suites: existing experiments with fixed settings, and a tuning budget for every method."""

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from cbp_jax import report
from cbp_jax.experiments import (
    Experiment,
    class_incremental,
    continual_imagenet,
    label_permuted,
    online_permuted,
    slippery_ant,
    slowly_changing_regression,
)
from cbp_jax.experiments.agents import MEASURES as AGENT_MEASURES
from cbp_jax.experiments.ants import ALTERNATING
from cbp_jax.experiments.learners import LogUniform, Method, told
from cbp_jax.experiments.tuning import Lane, Plan

FIRST_TUNING_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem of a suite.

    Attributes:
      name: name in tables, and of its folder.
      experiment: the experiment to run.
      settings: settings of the reported run, without `methods`. `seeds` is the number of held-out seeds.
      cost: approximate seconds of a task of plain backpropagation on one core, for the progress of the whole benchmark.
      counted: whether it counts in the score over all problems.
      needs: a package that it requires; without it the problem is left out.
    """

    name: str
    experiment: Experiment
    settings: Any
    cost: float
    counted: bool = True
    needs: str = ""

    @property
    def available(self) -> bool:
        """Whether the package that it needs is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    @property
    def measures(self) -> Mapping[str, str]:
        """The measures kept from the reported run: names and meanings."""
        if self.experiment is slippery_ant:
            return AGENT_MEASURES
        of_pools = self.experiment in (continual_imagenet, class_incremental)
        accuracy = self.experiment is not slowly_changing_regression
        return report.stream_measures(accuracy=accuracy, test=of_pools, dormant=of_pools)

    def changed(self, **changes: Any) -> Any:
        """Return the problem's settings with some values replaced, if it has these settings."""
        known = {field.name for field in dataclasses.fields(self.settings)}
        return dataclasses.replace(self.settings, **{name: changes[name] for name in known & changes.keys()})


@dataclasses.dataclass(frozen=True)
class Suite:
    """Problems, and the tuning budget of all methods.

    Attributes:
      name: in commands.
      about: one line for lists.
      problems: in the order of tables.
      configurations: number of configurations that every method tries on each problem.
      tuning_seeds: number of seeds for each configuration.
      timed_tasks: number of tasks for measuring the cost of an update.
    """

    name: str
    about: str
    problems: tuple[Problem, ...]
    configurations: int
    tuning_seeds: int
    timed_tasks: int = 4

    def problem(self, name: str) -> Problem:
        """Return a problem by its name. Raises a ValueError if there is none."""
        by_name = {problem.name: problem for problem in self.problems}
        if name not in by_name:
            raise ValueError(f"problems must be some of {list(by_name)}, got {name!r}")
        return by_name[name]

    @property
    def counted(self) -> list[str]:
        """Names of the problems that count in the overall score."""
        return [problem.name for problem in self.problems if problem.counted]

    def tuning(self, problem: Problem) -> Any:
        """Return settings of the search on a problem, without `methods`."""
        # Measures of units and weights do not affect the choice, and take time.
        return problem.changed(seeds=self.tuning_seeds, first_seed=FIRST_TUNING_SEED, measured_examples=1)

    def plan(self, problem: Problem, method: Method) -> Plan:
        """Return how a method is tuned and evaluated on a problem.

        Settings given with the method are not searched. A method without a space runs as it is. A space that has only
        lists of values is searched exhaustively.

        Example:
          >>> from cbp_jax.experiments.learners import parse_method
          >>> plan = SMOKE.plan(SMOKE.problems[0], parse_method("l2:step_size=0.01"))
          >>> [method.text for method in plan.tried()["l2(step_size=0.01)"]]
          ['l2:step_size=0.01,l2=1.11e-05', 'l2:step_size=0.01,l2=0.00847']
        """
        space = method.searched
        lane = Lane(method.label, method, space, method.look)
        ranges = any(isinstance(values, LogUniform) for values in space.values())
        grid = math.prod(map(len, space.values())) if not ranges else 0
        if grid > self.configurations:
            raise ValueError(
                f"{method.label}: space must have at most {self.configurations} combinations of values, or a range to "
                f"draw from, got {grid} of {told(space)}"
            )
        count = self.configurations if ranges else None
        return Plan(problem.experiment, (lane,), self.tuning(problem), problem.settings, problem.measures, count)

    def kept(self, problem: Problem, method: Method) -> dict[str, Any]:
        """Return what results record about how they were made; see `budget` for what all methods share."""
        return {**self.budget(problem), "method": method.text, "space": told(method.searched)}

    def budget(self, problem: Problem) -> dict[str, Any]:
        """Return what is the same for all methods of a problem: the number of configurations, and the settings of both
        runs."""
        plain = lambda settings: {
            key: value for key, value in dataclasses.asdict(settings).items() if key not in ("methods", "data_dir")
        }
        return {
            "suite": self.name,
            "problem": problem.name,
            "configurations": self.configurations,
            "tuning": plain(self.tuning(problem)),
            "reporting": plain(problem.settings),
        }


_HELD_OUT = 10

SMALL = Suite(
    "small",
    "digits and generated images; half an hour to two hours on 2 cores for each method",
    (
        Problem(
            "online_permuted",
            online_permuted,
            online_permuted.Settings(
                dataset="digits",
                seeds=_HELD_OUT,
                tasks=300,
                examples_per_task=1000,
                hidden=(50, 50, 50),
                measured_examples=500,
            ),
            0.008,
        ),
        Problem(
            "label_permuted",
            label_permuted,
            label_permuted.Settings(
                dataset="digits",
                seeds=_HELD_OUT,
                tasks=200,
                examples_per_task=1000,
                hidden=(50, 25),
                measured_examples=500,
            ),
            0.005,
        ),
        Problem(
            "continual_images",
            continual_imagenet,
            continual_imagenet.Settings(
                seeds=_HELD_OUT,
                tasks=150,
                network="mlp",
                hidden=(100, 100),
                batch_size=20,
                procedural_classes=200,
                procedural_size=28,
                downsample=2,
                train_per_class=80,
                test_per_class=20,
                epochs=40,
                measured_examples=100,
            ),
            0.034,
        ),
        Problem(
            "class_incremental",
            class_incremental,
            dataclasses.replace(class_incremental.preset("perceptron"), seeds=_HELD_OUT, tasks=10, epochs=30),
            0.6,
        ),
        Problem(
            "slowly_changing_regression",
            slowly_changing_regression,
            slowly_changing_regression.Settings(
                seeds=_HELD_OUT, tasks=200, examples_per_task=5000, measured_examples=500
            ),
            0.012,
        ),
    ),
    configurations=10,
    tuning_seeds=2,
)

# A suite of its own, because it needs another package, and takes as long as all problems of `SMALL`.
ANT = Suite(
    "ant",
    "PPO on an ant whose friction alternates; about an hour on 2 cores for each method",
    (
        Problem(
            "slippery_ant",
            slippery_ant,
            dataclasses.replace(ALTERNATING, seeds=5, steps=614_400),
            5.7,
            needs="brax",
        ),
    ),
    configurations=10,
    tuning_seeds=2,
)

FULL = Suite(
    "full",
    "the papers' datasets, in full or half size: for accelerators, with prepared datasets",
    (
        Problem(
            "online_permuted",
            online_permuted,
            dataclasses.replace(online_permuted.preset("paper"), seeds=10, tasks=200, hidden=(500, 500, 500)),
            20.0,
        ),
        Problem(
            "label_permuted",
            label_permuted,
            dataclasses.replace(label_permuted.preset("best"), seeds=10, measure_every=None),
            1.0,
        ),
        Problem(
            "continual_images",
            continual_imagenet,
            dataclasses.replace(continual_imagenet.preset("paper"), seeds=10, tasks=1000),
            60.0,
        ),
        Problem(
            "class_incremental",
            class_incremental,
            dataclasses.replace(class_incremental.preset("paper"), seeds=10),
            5000.0,
        ),
        Problem(
            "slowly_changing_regression",
            slowly_changing_regression,
            dataclasses.replace(slowly_changing_regression.preset("paper"), seeds=20),
            0.1,
        ),
        Problem(
            "slippery_ant",
            slippery_ant,
            dataclasses.replace(slippery_ant.preset("paper"), seeds=10),
            12.0,
            counted=False,
            needs="brax",
        ),
    ),
    configurations=30,
    tuning_seeds=3,
)

SMOKE = Suite(
    "smoke",
    "takes seconds, to check that everything works",
    (
        Problem(
            "online_permuted",
            online_permuted,
            online_permuted.Settings(
                dataset="digits", seeds=2, tasks=3, examples_per_task=20, hidden=(4,), measured_examples=1
            ),
            0.01,
        ),
        Problem(
            "slowly_changing_regression",
            slowly_changing_regression,
            slowly_changing_regression.Settings(seeds=2, tasks=3, examples_per_task=20, measured_examples=1),
            0.01,
        ),
    ),
    configurations=2,
    tuning_seeds=1,
)

SUITES: dict[str, Suite] = {suite.name: suite for suite in (SMALL, ANT, FULL, SMOKE)}
