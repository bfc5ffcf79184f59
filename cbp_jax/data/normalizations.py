"""The mean and standard deviation that experiments normalize inputs by."""

from cbp_jax.data.dataset import Dataset


def normalization(dataset: Dataset) -> tuple[float, float] | None:
    """What the experiments of Elsayed & Mahmood (2024) normalize a dataset's inputs by.

    Their public code takes the same numbers for all images, not the statistics of each dataset:

    | inputs | mean | standard deviation | in the public code |
    | --- | --- | --- | --- |
    | images | 0.5 | 0.5 | input-permuted MNIST, label-permuted EMNIST and CIFAR-10, each channel alike |
    | features | | | as they are: label-permuted mini-ImageNet |

    (The features of mini-ImageNet are there what a pretrained ResNet-50 makes of images that 0.5 and 0.5 normalized.)

    Args:
      dataset: as ``load`` returns it.

    Returns:
      mean and standard deviation of pixels in [0, 1], for the argument ``normalize`` of problems: pixels come to lie in
      [-1, 1]; None where inputs stay as they are.

    >>> from cbp_jax.data import load
    >>> normalization(load("digits"))
    (0.5, 0.5)

    References:
      Elsayed & Mahmood, `Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning
      <https://openreview.net/forum?id=sKPzAXoylB>`_, ICLR 2024; https://github.com/mohmdelsayed/upgd
    """
    return None if dataset.has_features else (0.5, 0.5)
