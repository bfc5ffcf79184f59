"""Networks of the experiments, as Flax linen modules."""

from cbp_jax.nets.activations import crelu, fourier, get_activation
from cbp_jax.nets.actor_critic import ActorCritic
from cbp_jax.nets.bert import Bert, TextClassifier
from cbp_jax.nets.bert_files import hugging_face_names, installed_encoder, load_bert
from cbp_jax.nets.convnet import ConvNet
from cbp_jax.nets.initializers import GAINS, fan_in_uniform, kaiming_uniform, sparse
from cbp_jax.nets.lenet import LeNet, lenet
from cbp_jax.nets.mlp import MLP, NORMALIZATIONS
from cbp_jax.nets.online_norm import OnlineNorm, keep_online_stats
from cbp_jax.nets.registry import NETWORKS, Network, make, read
from cbp_jax.nets.resnet import ResNet
from cbp_jax.nets.transformer import Encoder, ViT

__all__ = [
    "GAINS",
    "MLP",
    "NETWORKS",
    "NORMALIZATIONS",
    "ActorCritic",
    "Bert",
    "ConvNet",
    "Encoder",
    "LeNet",
    "Network",
    "OnlineNorm",
    "ResNet",
    "TextClassifier",
    "ViT",
    "crelu",
    "fan_in_uniform",
    "fourier",
    "get_activation",
    "hugging_face_names",
    "installed_encoder",
    "kaiming_uniform",
    "keep_online_stats",
    "lenet",
    "load_bert",
    "make",
    "read",
    "sparse",
]
