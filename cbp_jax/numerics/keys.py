"""Random keys inside transformations: how a factory's ``key`` becomes the key in the state.

A transformation's factory takes a key once, but its ``init`` may be vmapped over many seeds. If the factory's key were
the only source of randomness, every seed would draw the same noise. Therefore ``init`` folds the parameters into it.
The state holds raw key data (uint32), not a typed key, because every checkpointer can store raw arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.numerics.noise import element_numbers


def as_key_data(key: jax.typing.ArrayLike) -> tuple[jax.Array, str]:
    """Split a key of any form into raw data and the generator that the data belongs to.

    Args:
      key: a seed (Python or NumPy int, or integer scalar array), a typed key (``jax.random.key``), a raw key
        (``jax.random.PRNGKey``, uint32), or a tracer of one of these. One key, not a batch of them.

    Returns:
      The raw key data, uint32 [n] (n = 2 for JAX's default generator), and the name of its generator, so that
      ``jax.random.wrap_key_data(data, impl=name)`` is the key. Seeds and raw keys belong to the default generator.

    Raises:
      TypeError: if ``key`` is none of the above (a bool or a float, for example).
      ValueError: if ``key`` is a batch of keys, or raw data that does not fit the default generator.

    Example:
      >>> import jax
      >>> data, impl = as_key_data(7)
      >>> bool((data == jax.random.key_data(jax.random.key(7))).all()), impl
      (True, 'threefry2x32')
    """
    if not isinstance(key, int | np.integer | np.ndarray | jax.Array) or isinstance(key, bool):
        raise TypeError(f"key must be an int seed or a jax key, got {key!r} of type {type(key).__name__}")
    array: Any = key
    if not isinstance(array, jax.Array):
        array = np.asarray(array) if isinstance(array, np.ndarray) else jax.random.key(array)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        pass
    elif jnp.issubdtype(array.dtype, jnp.integer) and array.ndim == 0:
        array = jax.random.key(array)
    elif array.dtype == jnp.uint32:
        size = jax.random.key_data(jax.random.key(0)).size
        if array.shape[-1] != size:
            raise ValueError(
                f"key must be raw data of shape ({size},) for the default generator, got shape {array.shape}; "
                f"pass a typed key (jax.random.key) for another generator"
            )
        array = jax.random.wrap_key_data(array)
    else:
        raise TypeError(f"key must be an int seed or a jax key, got an array {array.dtype}{list(array.shape)}")
    if array.ndim:
        raise ValueError(f"key must be one key, got a batch of shape {array.shape}; vmap over init instead")
    return jax.random.key_data(array), str(jax.random.key_impl(array))


def init_key(key: jax.typing.ArrayLike, params: optax.Params) -> jax.Array:
    """Return the key with which a state starts: the factory's key with a checksum of the parameters' bits folded in.

    So under ``jax.vmap(tx.init)`` over differently initialized networks every seed gets its own noise, even though the
    factory captured a single key. Networks with bitwise equal parameters still share their noise. To give them
    different keys, build the transformation inside the vmapped function.

    Args:
      key: as in :func:`as_key_data`.
      params: a pytree of arrays, of any dtypes.

    Returns:
      Raw key data, uint32 [n].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> seeds = jax.vmap(lambda w: init_key(0, {"w": w}))(jnp.arange(6.0).reshape(2, 3))
      >>> seeds.shape, bool((seeds[0] == seeds[1]).all())
      ((2, 2), False)
    """
    data, impl = as_key_data(key)
    folded = jax.random.fold_in(jax.random.wrap_key_data(data, impl=impl), _checksum(params))
    return jax.random.key_data(folded)


def _checksum(params: optax.Params) -> jax.Array:
    """Return a uint32 that depends on every bit of the parameters and on their order.

    Integer sums modulo 2**32 are the same in any order, so jit, vmap and devices agree on it.
    """
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(params)):
        words = _bits(jnp.asarray(leaf))
        place = (element_numbers(words.shape) + 1) * np.uint32(0x9E3779B9) + np.uint32(number)
        # Two rounds of xor-shift and multiply ("lowbias32", C. Wellons), so that a change in one bit of one weight
        # changes about half of the sum's bits.
        words = words ^ place
        words = (words ^ (words >> 16)) * np.uint32(0x21F0AAAD)
        words = (words ^ (words >> 15)) * np.uint32(0xD35A2D97)
        total += jnp.sum(words ^ (words >> 15), dtype=jnp.uint32)
    return total


def _bits(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize, 4)  # eight-byte numbers become two words
    return jax.lax.bitcast_convert_type(leaf, f"uint{8 * width}").astype(jnp.uint32)
