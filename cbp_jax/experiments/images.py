"""Checks of datasets of images, and of the form in which a network gets them."""

from cbp_jax import data, nets
from cbp_jax.experiments.stream import ImageStreamSettings


def check_classes(images: data.Dataset) -> data.Dataset:
    """Return the dataset; raise a ValueError if it has fewer than two classes."""
    if images.num_classes < 2:
        raise ValueError(f"dataset must have at least 2 classes, and {images.name!r} has {images.num_classes}")
    return images


def gets_vectors(settings: ImageStreamSettings, images: data.Dataset) -> bool:
    """Return whether the network gets images as vectors, like features.

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
