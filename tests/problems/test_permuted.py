import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.data import Dataset
from cbp_jax.problems import online_permuted

EXAMPLES, PIXELS = 23, 12


@pytest.fixture(scope="module")
def dataset():
    # All bytes of an image differ, and so do all images: an input identifies its image and permutation.
    rng = np.random.default_rng(0)
    images = np.stack([rng.permutation(200)[:PIXELS] for _ in range(EXAMPLES)]).astype(np.uint8)
    return Dataset(
        images.reshape(EXAMPLES, 2, 3, 2),
        rng.integers(0, 5, EXAMPLES).astype(np.int32),
        num_classes=5,
        name="toy",
        max_value=200,
    )


@pytest.fixture(scope="module")
def problem(dataset):
    return online_permuted(dataset, batch_size=4)


def whole_task(problem, key, index):
    """Return all batches of a task in order, made inside one jitted scan, as in the training loop."""

    @jax.jit
    def run(data, key, index):
        task = problem.make_task(data, key, index)
        steps = jnp.arange(problem.steps_per_task)
        return task, jax.lax.scan(lambda _, step: (None, problem.batch(data, task, step)), None, steps)[1]

    return run(problem.data, key, index)


def indices_of(dataset, inputs, permutation):
    """Return the number of each input's image, after undoing the permutation."""
    flat = dataset.images.reshape(len(dataset), -1)
    unpermuted = np.empty_like(inputs)
    unpermuted[:, permutation] = inputs
    matches = (np.rint(unpermuted * dataset.max_value)[:, None] == flat[None]).all(-1)
    assert (matches.sum(1) == 1).all()
    return matches.argmax(1)


def test_a_task_shows_each_example_once_under_one_permutation(dataset, problem):
    task, (x, y) = whole_task(problem, jax.random.key(0), 2)
    assert problem.steps_per_task == 5 and problem.num_classes == 5
    assert x.shape == (5, 4, *problem.input_shape) == (5, 4, PIXELS) and x.dtype == jnp.float32
    assert y.shape == (5, 4) and y.dtype == jnp.int32
    assert sorted(task.permutation.tolist()) == list(range(PIXELS))
    indices = indices_of(dataset, np.asarray(x).reshape(20, PIXELS), np.asarray(task.permutation))
    assert len(set(indices)) == 20
    assert indices.tolist() != sorted(indices)
    np.testing.assert_array_equal(np.ravel(y), dataset.labels[indices])
    # Inputs are the images divided by their largest value, to the last bit, with and without jit.
    np.testing.assert_array_equal(
        np.asarray(x).reshape(20, PIXELS),
        dataset.images.reshape(EXAMPLES, PIXELS)[indices][:, task.permutation] * np.float32(1 / 200),
    )


def test_every_task_and_every_key_gives_different_examples(problem):
    tasks = [problem.make_task(problem.data, jax.random.key(k), i) for k, i in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(task.permutation.tolist()) for task in tasks}) == 3
    assert len({tuple(task.order.tolist()) for task in tasks}) == 3


def test_a_task_is_a_pure_function_of_key_and_index(problem):
    key = jax.random.key(7)
    eager = problem.make_task(problem.data, key, 3)
    traced, _ = whole_task(problem, key, jnp.int32(3))
    raw = problem.make_task(problem.data, jax.random.key_data(key), 3)
    for task in (traced, raw):
        np.testing.assert_array_equal(task.permutation, eager.permutation)
        np.testing.assert_array_equal(task.order, eager.order)


def test_seeds_share_the_data_and_equal_their_solo_runs(problem):
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def batches(data, keys):
        tasks = jax.vmap(problem.make_task, in_axes=(None, 0, None))(data, keys, 1)
        return jax.vmap(problem.batch, in_axes=(None, 0, None))(data, tasks, 2)

    x, y = batches(problem.data, keys)
    for row, key in enumerate(keys):
        alone = problem.batch(problem.data, problem.make_task(problem.data, key, 1), 2)
        np.testing.assert_array_equal(x[row], alone[0])
        np.testing.assert_array_equal(y[row], alone[1])
    assert not np.array_equal(x[0], x[1])


def test_the_data_stays_bytes_and_is_not_held_by_the_functions(problem):
    assert {name: array.dtype.name for name, array in problem.data.items()} == {
        "images": "uint8",
        "labels": "int32",
    }
    jaxpr = jax.make_jaxpr(lambda data, key: problem.batch(data, problem.make_task(data, key, 0), 0))(
        problem.data, jax.random.key(0)
    )
    assert sum(np.size(constant) for constant in jaxpr.consts) < EXAMPLES


def test_small_tasks_draw_their_own_examples(dataset):
    problem = online_permuted(dataset, examples_per_task=6)
    assert problem.steps_per_task == 6
    shown = []
    for index in range(3):
        task, (x, _) = whole_task(problem, jax.random.key(0), index)
        assert x.shape == (6, 1, PIXELS)
        shown.append(frozenset(indices_of(dataset, np.asarray(x)[:, 0], np.asarray(task.permutation)).tolist()))
        assert len(shown[-1]) == 6
    assert len(set(shown)) == 3


def test_long_tasks_show_their_examples_again_in_the_same_order(dataset):
    problem = online_permuted(dataset, examples_per_task=2 * EXAMPLES + 3)
    assert problem.steps_per_task == 2 * EXAMPLES + 3
    task, (x, y) = whole_task(problem, jax.random.key(0), 1)
    indices = indices_of(dataset, np.asarray(x)[:, 0], np.asarray(task.permutation))
    assert len(set(indices[:EXAMPLES])) == EXAMPLES
    np.testing.assert_array_equal(indices, np.resize(indices[:EXAMPLES], 2 * EXAMPLES + 3))
    np.testing.assert_array_equal(np.ravel(y), dataset.labels[indices])


def test_evaluation_is_distinct_random_examples_of_the_task(dataset):
    problem = online_permuted(dataset, examples_per_task=6)
    draws = []
    for index in range(2):
        task = problem.make_task(problem.data, jax.random.key(0), index)
        x, y = jax.jit(problem.evaluation, static_argnums=2)(problem.data, task, 9)  # more than a small task shows
        assert x.shape == (9, PIXELS) and x.dtype == jnp.float32 and y.dtype == jnp.int32
        indices = indices_of(dataset, np.asarray(x), np.asarray(task.permutation))
        assert len(set(indices)) == 9
        np.testing.assert_array_equal(y, dataset.labels[indices])
        draws.append(tuple(indices))
    assert draws[0] != draws[1]
    whole, _ = problem.evaluation(problem.data, task, EXAMPLES)
    assert len(set(indices_of(dataset, np.asarray(whole), np.asarray(task.permutation)))) == EXAMPLES
    with pytest.raises(ValueError, match="n must be an integer from 1 to 23; got 24"):
        problem.evaluation(problem.data, task, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples_per_task": 0}, "examples_per_task must be an integer of at least 1; got 0"),
        ({"examples_per_task": 5.0}, "examples_per_task must be an integer of at least 1; got 5.0"),
        ({"batch_size": 0}, "batch_size must be an integer from 1 to 23; got 0"),
        ({"batch_size": 24}, "batch_size must be an integer from 1 to 23; got 24"),
        ({"normalize": (0.5, 0.0)}, r"standard deviations above 0; got \(0.5, 0.0\)"),
        ({"normalize": (float("nan"), 1.0)}, "finite means"),
        ({"normalize": ((0.5, 0.5, 0.5), 1.0)}, r"one number, or one for each of 2 channels; got \(0.5, 0.5, 0.5\)"),
        ({"normalize": (0.5,)}, r"must be a mean and a standard deviation; got \(0.5,\)"),
        ({"batch_size": 7, "examples_per_task": 6}, "batch_size must be an integer from 1 to 6; got 7"),
    ],
)
def test_bad_settings_are_refused(dataset, settings, message):
    with pytest.raises(ValueError, match=message):
        online_permuted(dataset, **settings)


def test_normalization_of_each_channel(dataset, problem):
    normalize = ((0.25, 0.5), (0.5, 0.125))  # exact in binary
    normalized = online_permuted(dataset, batch_size=4, normalize=normalize)
    task = problem.make_task(problem.data, jax.random.key(0), 0)
    x, _ = normalized.batch(normalized.data, task, 1)
    plain = dataset.images[task.order[4:8]].astype(np.float64) / 200
    expected = ((plain - normalize[0]) / normalize[1]).reshape(4, PIXELS)[:, task.permutation]
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(normalized.batch)(normalized.data, task, 1)[0], x)


def test_features_are_permuted_too():
    features = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    dataset = Dataset(features, np.arange(5, dtype=np.int32), 5, "vectors")
    problem = online_permuted(dataset, batch_size=5)
    task = problem.make_task(problem.data, jax.random.key(0), 0)
    x, y = problem.batch(problem.data, task, 0)
    np.testing.assert_array_equal(x, features[y][:, task.permutation])
