"""The mean and standard deviation by which experiments normalize inputs."""

from cbp_jax.data.dataset import Dataset


def normalization(dataset: Dataset) -> tuple[float, float] | None:
    """Return the normalization of a dataset's inputs in the experiments of Elsayed & Mahmood (2024).

    Their public code uses the same numbers for all images, not the statistics of each dataset:

    | inputs | mean | standard deviation | in the public code |
    | --- | --- | --- | --- |
    | images | 0.5 | 0.5 | input-permuted MNIST, label-permuted EMNIST and CIFAR-10, each channel alike |
    | features | | | as they are: label-permuted mini-ImageNet |

    (There, the features of mini-ImageNet are those of a pretrained ResNet-50 for images normalized by 0.5 and 0.5.)

    Args:
      dataset: as ``load`` returns it.

    Returns:
      mean and standard deviation of pixels in [0, 1], for the argument ``normalize`` of problems, which map pixels to
      [-1, 1]; None if inputs are not normalized.

    >>> from cbp_jax.data import load
    >>> normalization(load("digits"))
    (0.5, 0.5)

    References:
      Elsayed & Mahmood, `Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning
      <https://openreview.net/forum?id=sKPzAXoylB>`_, ICLR 2024; https://github.com/mohmdelsayed/upgd
    """
    return None if dataset.has_features else (0.5, 0.5)
