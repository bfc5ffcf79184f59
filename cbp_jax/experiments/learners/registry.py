"""The learners by name."""

from cbp_jax.experiments.learners import (
    consolidation,
    continual_backprop,
    networks,
    plain,
    redo,
    regularization,
    upgd,
)
from cbp_jax.experiments.learners.method import Method

LEARNERS: dict[str, type[Method]] = {
    learner.name: learner
    for learner in (
        plain.Backprop,
        plain.Adam,
        regularization.ShrinkAndPerturbAdam,
        regularization.L2,
        regularization.L1,
        regularization.L2Init,
        regularization.L1Init,
        regularization.ProximalL1Init,
        regularization.ShrinkAndPerturb,
        upgd.PGD,
        upgd.UPGD,
        upgd.AdaptiveUPGD,
        consolidation.EWC,
        consolidation.MAS,
        consolidation.SynapticIntelligence,
        consolidation.RWalk,
        redo.ReDo,
        redo.ReDoAdam,
        regularization.WeightClipping,
        networks.Dropout,
        networks.LayerNorm,
        networks.OnlineNorm,
        networks.CReLU,
        continual_backprop.ContinualBackprop,
        continual_backprop.ContinualBackpropAdam,
        continual_backprop.ContinualBackpropUPGD,
    )
}
