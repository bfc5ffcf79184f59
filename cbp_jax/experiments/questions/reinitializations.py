"""Does it matter what replaced units start from?

Continual backpropagation, which ranks units by contribution, with each reinitialization that the library has, at its
best step size and replacement rate, beside plain backpropagation.
"""

from cbp_jax import replacement
from cbp_jax.experiments.questions.common import BACKPROP, STEP_SIZES, question
from cbp_jax.experiments.questions.utilities import RATES
from cbp_jax.experiments.tuning import Lane
from cbp_jax.report.looks import BLUE, Look, readable


def lanes() -> list[Lane]:
    """Plain backpropagation, and a lane for each reinitialization, by its name."""
    space = {"replacement_rate": RATES, "step_size": STEP_SIZES}
    looks = {"resample": Look("Resample", BLUE, strong=True)}
    method = lambda name: "cbp" if name == "resample" else f"cbp:reinitialization={name}"
    return [
        BACKPROP,
        *(
            Lane(name, method(name), space, looks.get(name, Look(readable(name))))
            for name in replacement.REINITIALIZATIONS
        ),
    ]


question_reinitialization = question(
    "question_reinitialization",
    "Does it matter what replaced units start from? Continual backpropagation with each reinitialization.",
    lanes,
    baselines=("bp", "resample"),
    tasks=500,
)
