"""Do the initial weights of replaced units matter?

Compares continual backpropagation with each reinitialization of the library, at its best step size and replacement
rate, and plain backpropagation. Units are ranked by contribution.
"""

from cbp_jax import replacement
from cbp_jax.experiments.questions.common import BACKPROP, STEP_SIZES, question
from cbp_jax.experiments.questions.utilities import RATES
from cbp_jax.experiments.tuning import Lane
from cbp_jax.report.looks import BLUE, Look, readable


def lanes() -> list[Lane]:
    """Return a lane for plain backpropagation, and one for each reinitialization, by its name."""
    space = {"replacement_rate": RATES, "step_size": STEP_SIZES}
    found = [BACKPROP]
    for name in replacement.REINITIALIZATIONS:
        plain = name == "resample"
        look = Look("Resample", BLUE, strong=True) if plain else Look(readable(name))
        found.append(Lane(name, "cbp" if plain else f"cbp:reinitialization={name}", space, look))
    return found


question_reinitialization = question(
    "question_reinitialization",
    "Do the initial weights of replaced units matter? Continual backpropagation with each reinitialization.",
    lanes,
    baselines=("bp", "resample"),
    tasks=500,
)
