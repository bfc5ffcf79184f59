"""Experiments by name: each is an `Experiment`, an object with settings, presets, a problem, a network."""

import sys

from cbp_jax.experiments import stream
from cbp_jax.experiments.adapters import continual_lora
from cbp_jax.experiments.ants import slippery_ant, stationary_ant
from cbp_jax.experiments.collapse import policy_collapse
from cbp_jax.experiments.dominance import dominant_tickets
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.games import continual_minatar
from cbp_jax.experiments.imagenet import continual_imagenet
from cbp_jax.experiments.increments import class_incremental
from cbp_jax.experiments.lottery import convolutional_tickets, lottery_tickets
from cbp_jax.experiments.permuted import input_permuted, label_permuted, online_permuted
from cbp_jax.experiments.progress import Progress
from cbp_jax.experiments.quality import utility_quality
from cbp_jax.experiments.questions.adapters import question_adapters
from cbp_jax.experiments.questions.penalties import question_penalty
from cbp_jax.experiments.questions.ranks import question_rank
from cbp_jax.experiments.questions.reinitializations import question_reinitialization
from cbp_jax.experiments.questions.tickets import question_tickets
from cbp_jax.experiments.questions.utilities import question_utility
from cbp_jax.experiments.questions.utility_ranking import question_utility_ranking
from cbp_jax.experiments.regression import slowly_changing_regression
from cbp_jax.experiments.streaming import streaming_control

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        online_permuted,
        input_permuted,
        label_permuted,
        slowly_changing_regression,
        utility_quality,
        continual_imagenet,
        class_incremental,
        slippery_ant,
        stationary_ant,
        policy_collapse,
        streaming_control,
        continual_minatar,
        lottery_tickets,
        convolutional_tickets,
        dominant_tickets,
        continual_lora,
        question_utility_ranking,
        question_utility,
        question_reinitialization,
        question_penalty,
        question_tickets,
        question_rank,
        question_adapters,
    )
}
# So that `from cbp_jax.experiments.online_permuted import Settings` finds it, too, as if each had a file of its own.
sys.modules.update({f"{__name__}.{name}": experiment for name, experiment in EXPERIMENTS.items()})

__all__ = ["EXPERIMENTS", "Experiment", "Progress", "stream", *EXPERIMENTS]
