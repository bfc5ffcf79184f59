"""The mean and standard deviation that experiments normalise inputs by."""

from cbp_jax.data.dataset import Dataset

_NORMALIZATIONS = {
    "mnist": (0.1307, 0.3081),  # of all pixels of the training images
}
_OTHERWISE = (0.5, 0.5)  # from [0, 1] to [-1, 1]


def normalization(dataset: Dataset) -> tuple[float, float] | None:
    """What the experiments of Elsayed & Mahmood (2024) normalise a dataset's inputs by.

    | dataset | mean | standard deviation | where it is from |
    | --- | --- | --- | --- |
    | MNIST | 0.1307 | 0.3081 | the statistics of its training images; input-permuted MNIST in the public code |
    | other images | 0.5 | 0.5 | label-permuted EMNIST and CIFAR-10 in the public code, each channel alike |
    | features | | | as they are; label-permuted mini-ImageNet in the public code |

    Args:
      dataset: as ``load`` returns it.

    Returns:
      mean and standard deviation of pixels in [0, 1], for the argument ``normalize`` of problems; None where
      inputs stay as they are.

    >>> from cbp_jax.data import load
    >>> normalization(load("digits"))
    (0.5, 0.5)

    References:
      Elsayed & Mahmood, `Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning
      <https://openreview.net/forum?id=sKPzAXoylB>`_, ICLR 2024; https://github.com/mohmdelsayed/upgd
    """
    if dataset.has_features:
        return None
    return _NORMALIZATIONS.get(dataset.name.split(":")[0], _OTHERWISE)
