"""L1 or L2, toward zero or toward the initial weights?

Compares SGD with each penalty, at its best step size and strength from one grid for all, and plain backpropagation.
Measures are accuracy, dead units, the rank of representations, and the magnitude, rank and sparsity of weights. The
proximal step is the form of L1 in which weights reach exactly the value that they are pulled toward.
"""

from cbp_jax.experiments.learners import LEARNERS
from cbp_jax.experiments.questions.common import BACKPROP, question
from cbp_jax.experiments.tuning import Lane

STEP_SIZES = (5e-3, 1e-2)
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def lanes() -> list[Lane]:
    """Return a lane for plain backpropagation, and one for each penalty."""
    names = ("l2", "l1", "l2_init", "l1_init", "proximal_l1_init")
    strength = lambda name: "l2" if name.startswith("l2") else "l1"
    return [
        BACKPROP,
        *(
            Lane(name, name, {strength(name): STRENGTHS, "step_size": STEP_SIZES}, LEARNERS[name].look)
            for name in names
        ),
    ]


question_penalty = question(
    "question_penalty",
    "L1 or L2, toward zero or toward the initial weights? Each at its best strength, and what becomes of the weights.",
    lanes,
    baselines=("bp", "l2", "l2_init"),
    tasks=1000,
    measures=(
        *("accuracy", "dead_units", "effective_rank"),
        *("weight_magnitude", "weight_effective_rank", "weight_sparsity"),
    ),
)
