"""Does the utility by which continual backpropagation ranks units matter?

Compares continual backpropagation with each utility of the library, at its best step size and replacement rate, and
plain backpropagation. "random" replaces random units, which shows how much there is to gain from ranking at all.
"""

from cbp_jax.experiments.questions.common import BACKPROP, STEP_SIZES, question
from cbp_jax.experiments.tuning import Lane
from cbp_jax.replacement import UTILITIES
from cbp_jax.report.looks import BLUE, Look, readable

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def lanes() -> list[Lane]:
    """Return a lane for plain backpropagation, and one for each utility of `replacement.UTILITIES`, by its name."""
    space = {"replacement_rate": RATES, "step_size": STEP_SIZES}
    looks = {"contribution": Look("Contribution", BLUE, strong=True)}
    return [
        BACKPROP,
        *(Lane(name, f"cbp:utility={name}", space, looks.get(name, Look(readable(name)))) for name in UTILITIES),
    ]


question_utility = question(
    "question_utility",
    "Does the utility matter? Continual backpropagation with each, at its best replacement rate.",
    lanes,
    baselines=("bp", "contribution"),
    tasks=300,
)
