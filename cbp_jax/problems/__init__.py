"""Streams of tasks, made on the device from explicit keys."""

from cbp_jax.problems.augmentation import augment
from cbp_jax.problems.class_incremental import Increment, IncrementalProblem, class_incremental
from cbp_jax.problems.continual_images import ImageTask, continual_images
from cbp_jax.problems.label_permuted import LabelPermutedTask, label_permuted
from cbp_jax.problems.permuted import PermutedTask, online_permuted
from cbp_jax.problems.problem import Problem
from cbp_jax.problems.regression import RegressionTask, slowly_changing_regression

__all__ = [
    "ImageTask",
    "Increment",
    "IncrementalProblem",
    "LabelPermutedTask",
    "PermutedTask",
    "Problem",
    "RegressionTask",
    "augment",
    "class_incremental",
    "continual_images",
    "label_permuted",
    "online_permuted",
    "slowly_changing_regression",
]
