"""The learners that experiments compare: each creates an optax transformation, or changes the network.

A *learner* is a frozen dataclass; each family has a file, and `LEARNERS` has all by name. Its fields are its settings.
Numbers are traced, so that methods that differ only in these are lanes of one program. A *method* is an instance: a
learner with its settings. `parse_method` reads a method from text, and `read_methods` all methods of a comparison. A
function that creates a transformation is a method too; see `custom`.
"""

from cbp_jax.experiments.learners.consolidation import EWC, MAS, RWalk, SynapticIntelligence
from cbp_jax.experiments.learners.continual_backprop import (
    ContinualBackprop,
    ContinualBackpropAdam,
    ContinualBackpropUPGD,
)
from cbp_jax.experiments.learners.factory import Custom, custom
from cbp_jax.experiments.learners.grid import expand, read_grid
from cbp_jax.experiments.learners.make import make_learner, make_optimizer
from cbp_jax.experiments.learners.method import (
    Method,
    choice,
    count,
    defaults_of,
    flag,
    named,
    ranged,
    settings_of,
)
from cbp_jax.experiments.learners.networks import CReLU, DeepFourier, Dropout, LayerNorm, OnlineNorm
from cbp_jax.experiments.learners.nonstationary import AdamReset, CChain, Muon, PlasticityInjection, Trac
from cbp_jax.experiments.learners.pictures import looks_by_learner, with_looks
from cbp_jax.experiments.learners.plain import Adam, Backprop
from cbp_jax.experiments.learners.redo import ReDo, ReDoAdam, ReGraMa, ReGraMaAdam
from cbp_jax.experiments.learners.registry import LEARNERS
from cbp_jax.experiments.learners.regularization import (
    L1,
    L2,
    L1Init,
    L2Init,
    Orthogonal,
    Parseval,
    ProximalL1Init,
    ShrinkAndPerturb,
    ShrinkAndPerturbAdam,
    Spectral,
    Wasserstein,
    WeightClipping,
)
from cbp_jax.experiments.learners.returning import DASH, FIRE, HareAndTortoise, NormalizeAndProject
from cbp_jax.experiments.learners.search import LogUniform, Space, configurations, told
from cbp_jax.experiments.learners.snr import SNR, SNRAdam
from cbp_jax.experiments.learners.text import parse_method, read_methods, texts_of
from cbp_jax.experiments.learners.upgd import PGD, UPGD, AdaptiveUPGD

__all__ = [
    "DASH",
    "EWC",
    "FIRE",
    "L1",
    "L2",
    "LEARNERS",
    "MAS",
    "PGD",
    "SNR",
    "UPGD",
    "Adam",
    "AdamReset",
    "AdaptiveUPGD",
    "Backprop",
    "CChain",
    "CReLU",
    "ContinualBackprop",
    "ContinualBackpropAdam",
    "ContinualBackpropUPGD",
    "Custom",
    "DeepFourier",
    "Dropout",
    "HareAndTortoise",
    "L1Init",
    "L2Init",
    "LayerNorm",
    "LogUniform",
    "Method",
    "Muon",
    "NormalizeAndProject",
    "OnlineNorm",
    "Orthogonal",
    "Parseval",
    "PlasticityInjection",
    "ProximalL1Init",
    "RWalk",
    "ReDo",
    "ReDoAdam",
    "ReGraMa",
    "ReGraMaAdam",
    "SNRAdam",
    "ShrinkAndPerturb",
    "ShrinkAndPerturbAdam",
    "Space",
    "Spectral",
    "SynapticIntelligence",
    "Trac",
    "Wasserstein",
    "WeightClipping",
    "choice",
    "configurations",
    "count",
    "custom",
    "defaults_of",
    "expand",
    "flag",
    "looks_by_learner",
    "make_learner",
    "make_optimizer",
    "named",
    "parse_method",
    "ranged",
    "read_grid",
    "read_methods",
    "settings_of",
    "texts_of",
    "told",
    "with_looks",
]
