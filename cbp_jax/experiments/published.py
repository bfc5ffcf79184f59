"""The search spaces and the published best settings of Elsayed & Mahmood, for each of their problems.

Both come from the public code: the searches in the programs named after the problems, and the single setting of each
learner in its `statistics_*` programs. Learners and settings have other names there:

| there | here |
| --- | --- |
| SGD, with weight decay | `bp`, `l2`: the decay is a part of the gradient |
| PGD | `pgd` |
| shrink and perturb | `shrink_and_perturb`: decay is `l2`, and sigma times the step size `noise` |
| Adam, with weight decay | `adam`, whose `weight_decay` does not go through the moments either |
| UPGD, and non-protecting UPGD | `upgd`, and `upgd:protect=false`: first order, global |
| EWC, MAS, SI, RWalk | by name: lamda is `strength`, beta_fisher is `beta_importance` |

The algorithms are the same, with these exceptions. The gate of UPGD differs in the first steps, see `cbp_jax.upgd`. The
importance in SI and RWalk differs: the public code multiplies a change of the weights by the gradient after it, instead
of the gradient that made it. Its RWalk uses the mean of squared weights instead of gradients as Fisher information, and
half of the latest score instead of the scores' mean. So the published settings need not be the best ones here.

References:
  Elsayed & Mahmood, `Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning
  <https://openreview.net/forum?id=sKPzAXoylB>`_, ICLR 2024; https://github.com/mohmdelsayed/upgd
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

# By learner, the settings in the columns of the tables below. The noise of shrink_and_perturb is step_size times sigma.
_CONSOLIDATION = ("step_size", "strength", "beta_weight", "beta_importance")
_UPGD = ("step_size", "beta_utility", "sigma", "weight_decay")
_SETTINGS = {
    "bp": ("step_size",),
    "l2": ("step_size", "l2"),
    "pgd": ("step_size", "sigma"),
    "shrink_and_perturb": ("step_size", "sigma", "l2"),
    "adam": ("step_size", "weight_decay", "b1", "b2"),
    "upgd": _UPGD,
    "upgd:protect=false": _UPGD,
    "ewc": _CONSOLIDATION,
    "mas": _CONSOLIDATION,
    "synaptic_intelligence": _CONSOLIDATION,
    "rwalk": _CONSOLIDATION,
}


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The published settings of a problem.

    Attributes:
      sigmas: values in the search of PGD and of shrink and perturb.
      betas: values of the utility's decay rate in the search of UPGD.
      decays: values in the searches of shrink and perturb and, with 0, of UPGD.
      best: by learner, the setting in the `statistics_*` program.
      also: by learner, the best settings in older branches of the public code: after a correction of SI and RWalk, and
        among settings with a beta_weight of at most 0.999.
    """

    sigmas: Sequence[float]
    betas: Sequence[float]
    decays: Sequence[float]
    best: Mapping[str, Sequence[float]]
    also: Mapping[str, Sequence[Sequence[float]]]

    @property
    def search(self) -> dict[str, tuple[Sequence[float], ...]]:
        """By learner, the values of each setting."""
        steps = (1e-2, 1e-3, 1e-4, 1e-5)
        upgd = (steps, self.betas, (0.01, 0.1, 1.0), (0.0, *self.decays))
        consolidation = (steps[:2], (0.1, 1.0, 10.0), (0.999, 0.9999), (0.999, 0.9999))
        return {
            "bp": (steps,),
            "l2": (steps, self.decays),
            "pgd": (steps, self.sigmas),
            "shrink_and_perturb": (steps, self.sigmas, self.decays),
            "adam": (steps, (0.0, 0.1, 0.01), (0.0, 0.9), (0.99, 0.999, 0.9999)),
            "upgd": upgd,
            "upgd:protect=false": upgd,
            "ewc": consolidation,
            "mas": consolidation,
            "synaptic_intelligence": consolidation,
            "rwalk": consolidation,
        }


PROBLEMS = {
    "input_permuted_mnist": _Problem(
        sigmas=(0.001, 0.01, 0.1),
        betas=(0.999, 0.9999),
        decays=(0.1, 0.01, 0.001, 0.0001),
        best={
            "l2": (0.001, 0.001),
            "pgd": (0.001, 0.05),
            "shrink_and_perturb": (0.001, 0.05, 0.01),
            "adam": (0.0001, 0.0, 0.0, 0.99),
            "upgd": (0.01, 0.9999, 0.1, 0.01),
            "upgd:protect=false": (0.001, 0.9, 0.1, 0.01),
            "ewc": (0.001, 1.0, 0.9999, 0.999),
            "mas": (0.001, 0.1, 0.9999, 0.999),
            "synaptic_intelligence": (0.001, 10.0, 0.99, 0.99),
            "rwalk": (0.001, 0.1, 0.9999, 0.99),
        },
        also={
            "ewc": [(0.001, 0.001, 0.99, 0.9999)],
            "mas": [(0.001, 0.1, 0.999, 0.9999)],
            "synaptic_intelligence": [(0.001, 0.1, 0.999, 0.9999)],
            "rwalk": [(0.001, 10.0, 0.9999, 0.99), (0.001, 10.0, 0.999, 0.99)],
        },
    ),
    "label_permuted_emnist": _Problem(
        sigmas=(0.005, 0.05, 0.5),
        betas=(0.99, 0.999),
        decays=(0.1, 0.01, 0.001, 0.0001),
        best={
            "l2": (0.01, 0.0001),
            "pgd": (0.01, 0.005),
            "shrink_and_perturb": (0.01, 0.005, 0.001),
            "adam": (0.0001, 0.1, 0.0, 0.9999),
            "upgd": (0.01, 0.9, 0.001, 0.0),
            "upgd:protect=false": (0.01, 0.9999, 0.01, 0.001),
            "ewc": (0.01, 1.0, 0.9999, 0.9999),
            "mas": (0.01, 1.0, 0.9999, 0.999),
            "synaptic_intelligence": (0.001, 1.0, 0.999, 0.9),
            "rwalk": (0.01, 0.1, 0.9999, 0.999),
        },
        also={
            "ewc": [(0.01, 1.0, 0.999, 0.999)],
            "mas": [(0.01, 10.0, 0.999, 0.999)],
            "synaptic_intelligence": [(0.01, 0.1, 0.9, 0.9)],
            "rwalk": [(0.01, 0.1, 0.9999, 0.99), (0.01, 0.1, 0.999, 0.9)],
        },
    ),
    "label_permuted_cifar10": _Problem(
        sigmas=(0.005, 0.05, 0.5),
        betas=(0.999, 0.9999),
        decays=(0.1, 0.01, 0.001),
        best={
            "l2": (0.01, 0.001),
            "pgd": (0.001, 0.005),
            "shrink_and_perturb": (0.01, 0.005, 0.001),
            "adam": (0.001, 0.01, 0.0, 0.9999),
            "upgd": (0.01, 0.999, 0.001, 0.0),
            "upgd:protect=false": (0.01, 0.99, 0.01, 0.001),
            "ewc": (0.01, 10.0, 0.999, 0.9999),
            "mas": (0.01, 10.0, 0.999, 0.9999),
            "synaptic_intelligence": (0.001, 1.0, 0.999, 0.9),
            "rwalk": (0.01, 0.1, 0.9999, 0.999),
        },
        also={
            "synaptic_intelligence": [(0.001, 0.01, 0.99, 0.99)],
            "rwalk": [(0.001, 10.0, 0.9999, 0.9), (0.001, 10.0, 0.999, 0.9)],
        },
    ),
    "label_permuted_mini_imagenet": _Problem(
        sigmas=(0.005, 0.05, 0.5),
        betas=(0.999, 0.9999),
        decays=(0.1, 0.01, 0.001),
        best={
            "l2": (0.01, 0.001),
            "pgd": (0.01, 0.005),
            "shrink_and_perturb": (0.01, 0.005, 0.001),
            "adam": (0.0001, 0.1, 0.9, 0.9999),
            "upgd": (0.01, 0.9, 0.001, 0.0),
            "upgd:protect=false": (0.01, 0.999, 0.01, 0.0001),
            "ewc": (0.01, 1.0, 0.9999, 0.999),
            "mas": (0.01, 1.0, 0.9999, 0.999),
            "synaptic_intelligence": (0.01, 0.1, 0.999, 0.999),
            "rwalk": (0.01, 0.1, 0.9999, 0.999),
        },
        also={
            "ewc": [(0.01, 1.0, 0.999, 0.999)],
            "mas": [(0.01, 10.0, 0.999, 0.999)],
            "synaptic_intelligence": [(0.01, 0.01, 0.99, 0.9)],
            "rwalk": [(0.01, 0.1, 0.9999, 0.9), (0.01, 0.1, 0.999, 0.99)],
        },
    ),
}


def paper_grid(problem: str) -> tuple[str, ...]:
    """Return the methods of the paper's search: for each learner all combinations of values, and the published best.

    The public programs list fewer values than were searched: many best settings are not among the combinations, and are
    added here. For SGD's decay, Adam, and consolidation they list no values; here a few around the best ones are used.

    Args:
      problem: one of `PROBLEMS`.

    Returns:
      texts of methods, all different.

    Raises:
      ValueError: there is no such problem.

    >>> grid = paper_grid("label_permuted_emnist")
    >>> len([method for method in grid if method.startswith("upgd:step_size")])
    121
    >>> set(best_methods("label_permuted_emnist")) <= set(grid)
    True
    """
    found = _problem(problem)
    settings = [
        (learner, numbers) for learner, values in found.search.items() for numbers in itertools.product(*values)
    ]
    settings += found.best.items()
    settings += [(learner, numbers) for learner, several in found.also.items() for numbers in several]
    order = list(_SETTINGS)
    settings.sort(key=lambda setting: order.index(setting[0]))
    return tuple(dict.fromkeys(_text(*setting) for setting in settings))


def best_methods(problem: str) -> tuple[str, ...]:
    """Return the paper's learners, each with its published best setting.

    Args:
      problem: one of `PROBLEMS`.

    Returns:
      texts of methods, one for each learner.

    Raises:
      ValueError: there is no such problem.

    >>> best_methods("label_permuted_emnist")[4:6]
    ('upgd:step_size=0.01,beta_utility=0.9,sigma=0.001,weight_decay=0', \
'upgd:protect=false,step_size=0.01,beta_utility=0.9999,sigma=0.01,weight_decay=0.001')
    """
    return tuple(itertools.starmap(_text, _problem(problem).best.items()))


def adam_with_restarts(problem: str) -> tuple[str, ...]:
    """Return Adam with and without a fresh network for every task, as in the paper's Figure 1, at each step size tried
    there.

    The public program reinitializes the weights but keeps Adam's moments; here they are reset too.

    Args:
      problem: one of `PROBLEMS`.

    Returns:
      texts of methods.

    Raises:
      ValueError: there is no such problem.

    >>> adam_with_restarts("input_permuted_mnist")[:2]
    ('adam:step_size=0.1', 'adam:step_size=0.1,reset=network')
    """
    _problem(problem)
    steps = ("0.1", "0.01", "0.001", "0.0001", "0.00001")
    return tuple(f"adam:step_size={step}{reset}" for step in steps for reset in ("", ",reset=network"))


def _problem(name: str) -> _Problem:
    if name not in PROBLEMS:
        raise ValueError(f"problem must be one of {list(PROBLEMS)}, got {name!r}")
    return PROBLEMS[name]


def _text(learner: str, numbers: Sequence[float]) -> str:
    given = dict(zip(_SETTINGS[learner], numbers, strict=True))
    if learner == "shrink_and_perturb":
        given["noise"] = given["step_size"] * given.pop("sigma")
    settings = ",".join(f"{name}={value:g}" for name, value in given.items())
    return f"{learner}{',' if ':' in learner else ':'}{settings}"
