"""Normal noise for every parameter at every step, at the cost of a few passes over the parameters.

`jax.random.normal` fills a leaf by a loop over the rounds of Threefry, each a pass through memory on CPU, and inverts
the normal distribution by long polynomials. The generator here is one expression per element, which XLA fuses with
the update that uses it:

1. a hash of (key, step, leaf), `pcg3d` of Jarzynski & Olano, gives three words to a leaf. With these an element's
   number is multiplied, added to and mixed, by the two multiplications of Wellons' `lowbias32`, into a random word;
2. how many bits of the word are set is binomial, of 32 tosses; the halves of another word, a multiple of the first,
   are added to smooth it. A cubic polynomial gives the sum the variance and the kurtosis of a normal number.

What is given up against exact normal numbers: the distribution function is off by at most 1.7e-4, no number is farther
than 6.5 standard deviations from 0, and beyond 4 of them there are about a tenth too few. Box & Muller's exact formula
takes longer, as it needs a logarithm, a root and a sine.

It is meant for perturbations, not for cryptography. An element's noise depends only on key, step, leaf and its index in
the leaf, so that under `vmap` every seed draws the same numbers as in a solo run.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax.numerics.rounding import rounded, unforeseen_zero

_U32 = np.uint32

# n (c0 + c1 n**2), with n / 2**16 the centered sum of 32 bits and two uniform numbers, has variance 1 and kurtosis 3.
_CUBIC = (0.347150173 * 2.0**-16, 1.15377268e-4 * 2.0**-48)


def normal(key: chex.Array, step: chex.Numeric, tree: Any, scale: chex.Numeric = 1.0) -> Any:
    """Draw independent normal numbers of mean 0 in the shapes of a tree.

    Args:
      key: raw key data, uint32 [n], as from `keys.init_key`.
      step: number of the draw, an integer, may be traced. Different steps have different noise.
      tree: pytree of arrays, or of anything with a shape.
      scale: standard deviation, >= 0, may be traced.

    Returns:
      pytree of float32 arrays of the same shapes. None is farther than 6.47 standard deviations from 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> noise = normal(jax.random.PRNGKey(0), 3, {"w": jnp.zeros((100, 100)), "b": jnp.zeros(5)})
      >>> noise["b"].shape, bool(jnp.abs(noise["w"].mean()) < 0.03), bool(jnp.abs(noise["w"].std() - 1) < 0.03)
      ((5,), True, True)

    References:
      Jarzynski & Olano, `Hash functions for GPU rendering <https://jcgt.org/published/0009/03/02/>`_, 2020

      Wellons, `Prospecting for hash functions <https://nullprogram.com/blog/2018/07/31/>`_, 2018

      Cornish & Fisher, `Moments and cumulants in the specification of distributions
      <https://doi.org/10.2307/1400905>`_, 1938, for the cubic polynomial
    """
    leaves, treedef = jax.tree.flatten(tree)
    x, y, z = _hash(key[0], key[-1], jnp.asarray(step).astype(jnp.uint32))
    noise, zero = [], unforeseen_zero(step)
    for number, leaf in enumerate(leaves):
        words = _words(jnp.shape(leaf), *_hash(x ^ _U32(number), y, z))
        noise.append(_nearly_normal(words, jnp.asarray(scale, jnp.float32), zero))
    return jax.tree.unflatten(treedef, noise)


def element_numbers(shape: tuple[int, ...], factor: chex.Numeric = 1, offset: chex.Numeric = 0) -> chex.Array:
    """Return a uint32 array of the given shape: each element's index in the flat array, times a factor, plus an
    offset."""
    numbers = jnp.full(shape, offset, jnp.uint32)
    for axis in range(len(shape)):
        stride = _U32(np.prod(shape[axis + 1 :], dtype=np.int64) % 2**32)
        # The factor here, not around the sum: in a loop XLA would keep the indices in memory, and read them again.
        numbers += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * (stride * factor)
    return numbers


def _hash(x: chex.Array, y: chex.Array, z: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Apply pcg3d: a permutation of the triples of 32-bit words in which every word depends on all."""
    x, y, z = (word * _U32(1664525) + _U32(1013904223) for word in (x, y, z))
    x = x + y * z
    y = y + z * x
    z = z + x * y
    x, y, z = (word ^ (word >> _U32(16)) for word in (x, y, z))
    x = x + y * z
    y = y + z * x
    z = z + x * y
    return x, y, z


def _words(shape: tuple[int, ...], factor: chex.Array, offset: chex.Array, mask: chex.Array) -> chex.Array:
    """Return a random word for each element, different ones for different elements."""
    word = element_numbers(shape, factor | _U32(1), offset)
    word = (word ^ (word >> _U32(16)) ^ mask) * _U32(0x7FEB352D)
    word = (word ^ (word >> _U32(15))) * _U32(0x846CA68B)
    return word ^ (word >> _U32(16))


def _nearly_normal(word: chex.Array, scale: chex.Array, zero: chex.Array) -> chex.Array:
    """Return scale times a nearly normal number of a random word."""
    other = word * _U32(0x9E3779B9)
    halves = (other >> _U32(16)) + (other & _U32(0xFFFF))
    n = (jax.lax.population_count(word) << _U32(16)) + halves  # of mean 16 * 2**16 + 65535
    n = jax.lax.bitcast_convert_type(n - _U32(16 * 2**16 + 65535), jnp.int32)
    x = n.astype(jnp.float32)
    # Every sum here adds a single product, and so does the sum of the result and a gradient: of two products a compiler
    # may contract either into a fused multiply-add, and a vmapped draw could differ from the same draw alone.
    return rounded(scale * (x * (np.float32(_CUBIC[0]) + np.float32(_CUBIC[1]) * (x * x))), zero)
