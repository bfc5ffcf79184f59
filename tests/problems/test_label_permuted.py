import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.data import Dataset, normalization
from cbp_jax.problems import label_permuted

EXAMPLES, CLASSES = 11, 4


@pytest.fixture(scope="module")
def dataset():
    # All first pixels differ, so an input identifies its image.
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (EXAMPLES, 2, 3, 2)).astype(np.uint8)
    images[:, 0, 0, 0] = rng.permutation(EXAMPLES)
    return Dataset(images, (np.arange(EXAMPLES) % CLASSES).astype(np.int32), CLASSES, "toy", max_value=200)


@pytest.fixture(scope="module")
def problem(dataset):
    return label_permuted(dataset, examples_per_task=27, batch_size=3)


def indices_of(dataset, inputs):
    pixels = np.rint(np.asarray(inputs).reshape(len(inputs), -1)[:, 0] * 200)
    return np.argmax(pixels[:, None] == dataset.images[None, :, 0, 0, 0], axis=1)


def whole_task(problem, key, index):
    @jax.jit
    def run(data, key, index):
        task = problem.make_task(data, key, index)
        steps = jnp.arange(problem.steps_per_task)
        return task, jax.lax.scan(lambda _, step: (None, problem.batch(data, task, step)), None, steps)[1]

    task, (x, y) = run(problem.data, key, index)
    return task, np.asarray(x).reshape(-1, *problem.input_shape), np.asarray(y).ravel()


def test_labels_change_but_images_do_not(dataset, problem):
    task, x, y = whole_task(problem, jax.random.key(0), 0)
    assert (problem.num_classes, problem.steps_per_task, problem.loss) == (CLASSES, 9, "softmax_cross_entropy")
    assert x.shape == (27, 12) and x.dtype == np.float32 and y.dtype == np.int32
    assert sorted(task.labels.tolist()) == list(range(CLASSES))
    indices = indices_of(dataset, x)
    np.testing.assert_array_equal(x, dataset.images.reshape(EXAMPLES, 12)[indices] * np.float32(1 / 200))
    np.testing.assert_array_equal(y, np.asarray(task.labels)[dataset.labels[indices]])


def test_more_examples_than_there_are_go_through_all_in_fresh_orders(dataset, problem):
    indices = indices_of(dataset, whole_task(problem, jax.random.key(0), 3)[1]).tolist()
    passes = [indices[:11], indices[11:22], indices[22:]]
    assert [len(set(some)) for some in passes] == [11, 11, 5]
    assert passes[0] != passes[1] and passes[0][:5] != passes[2]


def test_fewer_examples_are_distinct_and_each_task_draws_its_own(dataset):
    problem = label_permuted(dataset, examples_per_task=7)
    orders = jax.jit(jax.vmap(lambda index: problem.make_task(problem.data, jax.random.key(0), index).order))
    shown = orders(jnp.arange(3)).tolist()
    assert all(len(set(some)) == 7 for some in shown)
    assert len({frozenset(some) for some in shown}) == 3


def test_permutations_are_uniform_from_the_first_task_on(problem):
    def labels(key, index):
        return problem.make_task(problem.data, key, index).labels

    keys = jax.random.split(jax.random.key(0), 2400)
    for index in (0, 1):
        drawn = np.asarray(jax.jit(jax.vmap(labels, (0, None)))(keys, index))
        _, counts = np.unique(drawn, axis=0, return_counts=True)
        assert len(counts) == math.factorial(CLASSES)  # 100 are expected, with a deviation of 9.8
        assert ((counts - 100) ** 2 / 100).sum() < 50  # 100 each, give or take 9.8
    one_stream = np.asarray(jax.jit(jax.vmap(labels, (None, 0)))(jax.random.key(5), jnp.arange(60)))
    assert len(np.unique(one_stream, axis=0)) > 15  # tasks of a stream differ


def test_seeds_share_the_data_and_equal_their_solo_runs(dataset):
    problem = label_permuted(dataset, examples_per_task=9, batch_size=3)
    keys = jax.random.split(jax.random.key(0), 3)
    make = jax.jit(problem.make_task)

    @jax.jit
    def batches(data, keys):
        tasks = jax.vmap(problem.make_task, in_axes=(None, 0, None))(data, keys, 1)
        return tasks, jax.vmap(problem.batch, in_axes=(None, 0, None))(data, tasks, 2)

    tasks, (x, y) = batches(problem.data, keys)
    for row, key in enumerate(keys):
        task = make(problem.data, key, 1)
        np.testing.assert_array_equal(tasks.labels[row], task.labels)
        np.testing.assert_array_equal(tasks.order[row], task.order)
        alone = problem.batch(problem.data, task, 2)
        np.testing.assert_array_equal(x[row], alone[0])
        np.testing.assert_array_equal(y[row], alone[1])
    assert not np.array_equal(tasks.order[0], tasks.order[1])


def test_images_for_convolutions_are_the_same_images(dataset):
    flat = label_permuted(dataset, examples_per_task=9, batch_size=4)
    square = label_permuted(dataset, examples_per_task=9, batch_size=4, flatten=False)
    assert square.input_shape == (2, 3, 2) and flat.steps_per_task == 2
    task = flat.make_task(flat.data, jax.random.key(0), 0)
    x, y = square.batch(square.data, task, 1)
    np.testing.assert_array_equal(x, dataset.images[task.order[4:8]] * np.float32(1 / 200))
    np.testing.assert_array_equal(np.reshape(x, (4, -1)), flat.batch(flat.data, task, 1)[0])
    np.testing.assert_array_equal(y, flat.batch(flat.data, task, 1)[1])


def test_normalization(dataset):
    problem = label_permuted(dataset, examples_per_task=9, normalize=normalization(dataset), flatten=False)
    task = problem.make_task(problem.data, jax.random.key(0), 0)
    x, _ = problem.evaluation(problem.data, task, EXAMPLES)
    assert x.min() >= -1 and x.max() < 1
    np.testing.assert_allclose(np.sort(x.ravel()), np.sort(dataset.images.ravel() / 100 - 1), atol=1e-6)


def test_features_of_many_classes():
    features = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    dataset = Dataset(features, np.array([0, 344, 17, 3, 344], np.int32), 345, "vectors")
    problem = label_permuted(dataset, examples_per_task=5, batch_size=5, normalize=normalization(dataset))
    task = problem.make_task(problem.data, jax.random.key(0), 0)
    x, y = problem.batch(problem.data, task, 0)
    assert task.labels.shape == (345,)
    np.testing.assert_array_equal(x, features[task.order[:5]])
    np.testing.assert_array_equal(y, task.labels[dataset.labels[task.order[:5]]])


def test_evaluation_is_distinct_random_examples(dataset, problem):
    draws = []
    for index in range(2):
        task = problem.make_task(problem.data, jax.random.key(0), index)
        x, y = problem.evaluation(problem.data, task, 9)
        indices = indices_of(dataset, x)
        assert len(set(indices)) == 9
        np.testing.assert_array_equal(y, np.asarray(task.labels)[dataset.labels[indices]])
        draws.append(tuple(indices))
    assert draws[0] != draws[1]
    with pytest.raises(ValueError, match="n must be an integer from 1 to 11; got 12"):
        problem.evaluation(problem.data, task, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples_per_task": 0}, "examples_per_task must be an integer of at least 1; got 0"),
        ({"examples_per_task": 5.0}, r"examples_per_task must be an integer of at least 1; got 5\.0"),
        ({"batch_size": 2501}, "batch_size must be an integer from 1 to 2500; got 2501"),
        ({"normalize": (0.5, -1.0)}, "standard deviations above 0"),
    ],
)
def test_bad_settings_are_refused(dataset, settings, message):
    with pytest.raises(ValueError, match=message):
        label_permuted(dataset, **settings)
