"""scikit-learn's bundled handwritten digits, split for training and testing, and augmented by shifts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMAGE_SIZE = 16  # the digits are 8x8: doubled, so that windows of the first stage are a small part of the grid
MAX_SHIFT = 2  # pixels, in the doubled image


def digits(seed: int = 0) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns ``(images, labels)`` of 1437 training and 360 test digits, every class split in the same proportion.

    Images are float32 ``[N, 16, 16, 1]`` of zero mean and unit variance, labels int32 ``[N]``. The split depends on
    ``seed`` alone.
    """
    bunch = load_digits()
    images = jax.image.resize(
        jnp.asarray(bunch.images, jnp.float32), (len(bunch.images), IMAGE_SIZE, IMAGE_SIZE), "bilinear"
    )
    images, labels = np.asarray(images)[..., None], bunch.target.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=seed)
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return (images[train], labels[train]), (images[test], labels[test])


def shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image by up to ``MAX_SHIFT`` pixels per axis; the border, which is background, fills the gap."""
    padding = (MAX_SHIFT, MAX_SHIFT)
    padded = jnp.pad(images, ((0, 0), padding, padding, (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * MAX_SHIFT + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)
