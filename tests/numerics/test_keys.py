import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.numerics.keys import as_key_data, init_key


@pytest.mark.parametrize(
    "key",
    [
        5,
        np.int64(5),
        np.array(5),
        jnp.int32(5),
        jax.random.key(5),
        jax.random.PRNGKey(5),
        np.asarray(jax.random.PRNGKey(5)),
    ],
    ids=["int", "numpy int", "numpy scalar", "jax scalar", "typed", "raw", "raw numpy"],
)
def test_every_form_of_a_key_is_the_same_key(key):
    data, impl = as_key_data(key)
    np.testing.assert_array_equal(data, jax.random.key_data(jax.random.key(5)))
    assert data.dtype == jnp.uint32
    assert impl == "threefry2x32"


def test_traced_seeds_and_keys():
    seeds = jnp.arange(3)
    expected = jax.vmap(jax.random.PRNGKey)(seeds)
    for forms in (seeds, jax.vmap(jax.random.key)(seeds), expected):
        np.testing.assert_array_equal(jax.vmap(lambda key: as_key_data(key)[0])(forms), expected)


def test_other_generators_keep_their_name():
    key = jax.random.key(5, impl="rbg")
    data, impl = as_key_data(key)
    assert jax.random.wrap_key_data(data, impl=impl) == key


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        (True, TypeError, "True of type bool"),
        (1.5, TypeError, "1.5 of type float"),
        (None, TypeError, "None of type NoneType"),
        (jnp.zeros(2), TypeError, "float32"),
        (jax.random.split(jax.random.key(0)), ValueError, "one key, got a batch"),
        (jnp.zeros((3, 2), jnp.uint32), ValueError, "one key, got a batch"),
        (jnp.zeros(4, jnp.uint32), ValueError, r"shape \(2,\)"),
    ],
)
def test_invalid_keys_are_refused(key, error, words):
    with pytest.raises(error, match=f"key must be .*{words}"):
        as_key_data(key)


def test_init_key_depends_on_key_values_and_places():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
    nudged = {**params, "a": params["a"].at[1, 2].add(1e-6 * 5)}
    permuted = {**params, "a": params["a"][::-1]}
    swapped = {"a": params["b"], "b": params["a"]}
    keys = [init_key(0, p) for p in (params, nudged, permuted, swapped)] + [init_key(1, params)]
    assert len({tuple(np.asarray(key).tolist()) for key in keys}) == 5
    np.testing.assert_array_equal(init_key(0, params), jax.jit(init_key)(0, params))


def test_init_key_under_vmap_is_the_solo_key_and_differs_between_seeds():
    params = {"w": jax.random.normal(jax.random.key(0), (4, 5, 3)), "n": jnp.zeros((4, 2), jnp.int32)}
    keys = jax.vmap(lambda p: init_key(7, p))(params)
    for seed in range(4):
        np.testing.assert_array_equal(keys[seed], init_key(7, jax.tree.map(lambda x, seed=seed: x[seed], params)))
    assert len(np.unique(np.asarray(keys), axis=0)) == 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.bool_, jnp.complex64])
def test_init_key_reads_every_dtype(dtype):
    ones, zeros = jnp.ones(3, dtype), jnp.zeros(3, dtype)
    assert (init_key(0, ones) != init_key(0, zeros)).any()


def test_init_key_without_parameters():
    np.testing.assert_array_equal(init_key(0, {}), jax.random.key_data(jax.random.fold_in(jax.random.key(0), 0)))
