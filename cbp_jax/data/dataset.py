"""A dataset in memory, and the error for a missing one."""

import dataclasses

import numpy as np


class DatasetUnavailable(RuntimeError):
    """Raised if a known dataset's files are not on this machine. The message says how to get them."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labeled images of one split, or feature vectors instead of images, as NumPy arrays on the host.

    Attributes:
      images: uint8 [n, height, width, channels], or float32 [n, features].
      labels: int32 [n], from 0 to num_classes - 1.
      num_classes: number of classes; some may have no examples.
      name: the name under which it was loaded, for titles and results.
      max_value: value of the brightest pixel (255, but 16 in scikit-learn's digits); ``images / max_value``
        is in [0, 1]. Not used for features.

    Raises:
      ValueError: if the arrays do not have these types and shapes or a value is out of range.

    >>> import numpy as np
    >>> images, labels = np.zeros((3, 28, 28, 1), np.uint8), np.array([0, 1, 1], np.int32)
    >>> Dataset(images, labels, num_classes=2, name="blank")
    Dataset(blank: 3 images of 28x28x1, 2 classes)
    >>> Dataset(np.zeros((3, 2048), np.float32), labels, num_classes=2, name="blank")
    Dataset(blank: 3 vectors of 2048, 2 classes)
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    name: str
    max_value: int = 255

    def __post_init__(self):
        images, labels = self.images, self.labels
        if (images.ndim, images.dtype) not in ((4, np.uint8), (2, np.float32)) or not images.size:
            raise ValueError(
                "images must be uint8 [n, height, width, channels], or float32 [n, features], and not empty; "
                f"got {images.dtype} {list(images.shape)}"
            )
        if labels.shape != images.shape[:1] or labels.dtype != np.int32:
            raise ValueError(f"labels must be int32 [{len(images)}]; got {labels.dtype} {list(labels.shape)}")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"labels must be from 0 to num_classes - 1 = {self.num_classes - 1}; "
                f"got {labels.min()} to {labels.max()}"
            )
        if self.has_features:
            with np.errstate(invalid="ignore"):  # infinity minus infinity
                total = images.sum(dtype=np.float64)  # instead of a mask as large as the features
            if not np.isfinite(total):
                raise ValueError("images must be finite; some features are infinite or not a number")
        elif not images.max() <= self.max_value:
            raise ValueError(f"images must not exceed max_value = {self.max_value}; got {images.max()}")

    def __repr__(self) -> str:
        kind = "vectors" if self.has_features else "images"
        size = "x".join(map(str, self.image_shape))
        return f"Dataset({self.name}: {len(self)} {kind} of {size}, {self.num_classes} classes)"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels), or (features,)."""
        return self.images.shape[1:]

    @property
    def has_features(self) -> bool:
        """Whether ``images`` holds feature vectors, which are not scaled."""
        return self.images.dtype == np.float32
