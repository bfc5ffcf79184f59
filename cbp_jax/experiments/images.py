"""Whether a dataset of images suits an experiment, and how its network gets them."""

from cbp_jax import data, nets
from cbp_jax.experiments.stream import ImageStreamSettings


def check_classes(images: data.Dataset) -> data.Dataset:
    """The dataset; raises a ValueError if there is nothing to tell apart in it."""
    if images.num_classes < 2:
        raise ValueError(f"dataset must have at least 2 classes, and {images.name!r} has {images.num_classes}")
    return images


def gets_vectors(settings: ImageStreamSettings, images: data.Dataset) -> bool:
    """Whether the network gets images as vectors, as features are.

    Raises:
      ValueError: it takes neither images of this size nor vectors.
    """
    network = nets.read(settings.network)
    own = network.own({"hidden": settings.hidden, "activation": settings.activation})
    if not images.has_features:
        return not network.takes_images(images.image_shape, images.num_classes, **own)
    try:
        network.make(images.image_shape, images.num_classes, **own)
    except ValueError as error:
        raise ValueError(
            f"network {network.name!r} needs images, and {settings.dataset!r} holds features ({error})"
        ) from error
    return True
