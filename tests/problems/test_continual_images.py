import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.data import Dataset
from cbp_jax.problems import continual_images

CLASSES, EACH, TRAIN, TEST, EPOCHS, BATCH = 7, 8, 5, 2, 3, 4


@pytest.fixture(scope="module")
def dataset():
    """Make shuffled images. The first two pixels are the class and the image's number within its class."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), EACH)).astype(np.int32)
    images = np.zeros((len(labels), 2, 3, 1), np.uint8)
    images[:, 0, 0, 0] = labels
    for number in range(CLASSES):
        images[labels == number, 0, 1, 0] = np.arange(EACH)
    return Dataset(images, labels, CLASSES + 1, "toy")  # a class has no image


@pytest.fixture(scope="module")
def problem(dataset):
    return continual_images(dataset, train_per_class=TRAIN, test_per_class=TEST, epochs=EPOCHS, batch_size=BATCH)


@pytest.fixture(scope="module")
def show(problem):
    """Return a task as NumPy arrays: its classes, and the examples of all batches, the evaluation and the test."""

    @jax.jit
    def everything(data, key, index):
        task = problem.make_task(data, key, index)
        batches = jax.vmap(lambda step: problem.batch(data, task, step))(jnp.arange(problem.steps_per_task))
        return task.classes, batches, problem.evaluation(data, task, 6), problem.test(data, task)

    return lambda key, index: jax.tree.map(np.asarray, everything(problem.data, key, index))


def identities(inputs):
    """Return class and number of each example."""
    pixels = np.rint(inputs.reshape(-1, 6)[:, :2] * 255).astype(int)
    return [tuple(row) for row in pixels]


def test_an_epoch_shows_each_training_example_at_most_once_in_a_fresh_order(problem, show):
    classes, (x, y), _, _ = show(jax.random.key(0), 0)
    assert problem.steps_per_task == EPOCHS * (2 * TRAIN // BATCH) and problem.num_classes == 2
    assert x.shape == (problem.steps_per_task, BATCH, 2, 3, 1) and x.dtype == np.float32 and y.dtype == np.int32
    examples, labels = identities(x), y.ravel()
    assert [number for number, _ in examples] == classes[labels].tolist()
    training = {(number, place) for number in classes for place in range(TRAIN)}
    epochs = np.array_split(np.arange(len(examples)), EPOCHS)
    orders = [[examples[i] for i in epoch] for epoch in epochs]
    for order in orders:
        assert len(set(order)) == len(order) == 8 and set(order) <= training
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({frozenset(order) for order in orders}) > 1  # the examples left out of the last batch change, too


def test_test_examples_are_all_those_of_the_task_that_no_batch_shows(show):
    classes, _, (x, y), (test_x, test_y) = show(jax.random.key(0), 1)
    assert identities(test_x) == [(number, place) for number in classes for place in range(TRAIN, TRAIN + TEST)]
    assert test_y.tolist() == [0] * TEST + [1] * TEST and test_y.dtype == np.int32
    measured = identities(x)
    assert len(set(measured)) == 6 and all(place < TRAIN for _, place in measured)
    assert [number for number, _ in measured] == classes[y].tolist()


def test_a_class_comes_again_only_after_the_others_and_with_another(show):
    key = jax.random.key(3)
    dealt = [show(key, index)[0].tolist() for index in range(12)]
    rounds = [dealt[start : start + 3] for start in range(0, 12, 3)]  # one of the 7 classes is left out
    for one in rounds:
        assert len({number for pair in one for number in pair}) == 6
    assert max(number for pair in dealt for number in pair) < CLASSES
    assert len({frozenset(pair) for pair in dealt}) > 6  # later rounds have other pairs than the first
    missing = [set(range(CLASSES)) - {number for pair in one for number in pair} for one in rounds]
    assert len({tuple(one) for one in missing}) > 1
    assert show(key, 7)[0].tolist() == dealt[7]
    assert [show(jax.random.key(4), index)[0].tolist() for index in range(3)] != dealt[:3]


def test_lanes_see_the_same_data_as_when_run_alone(problem, show):
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def lanes(data, keys):
        tasks = jax.vmap(problem.make_task, (None, 0, None))(data, keys, 5)
        return jax.vmap(problem.batch, (None, 0, None))(data, tasks, 2)

    x, y = lanes(problem.data, keys)
    for row, key in enumerate(keys):
        _, (alone_x, alone_y), _, _ = show(key, 5)
        np.testing.assert_array_equal(x[row], alone_x[2])
        np.testing.assert_array_equal(y[row], alone_y[2])


def test_inputs_are_normalized_and_tasks_may_have_more_classes(dataset):
    problem = continual_images(
        dataset, train_per_class=2, test_per_class=1, epochs=1, batch_size=6, classes_per_task=3, normalize=(0.5, 0.25)
    )
    task = problem.make_task(problem.data, jax.random.key(0), 0)
    x, y = problem.batch(problem.data, task, 0)
    assert sorted(y.tolist()) == [0, 0, 1, 1, 2, 2] and problem.num_classes == 3
    np.testing.assert_allclose(x[:, 0, 0, 0], (np.asarray(task.classes)[y] / 255 - 0.5) / 0.25, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_per_class": 0}, "train_per_class must be an integer of at least 1; got 0"),
        ({"test_per_class": 0}, "test_per_class must be an integer of at least 1; got 0"),
        ({"epochs": 0.5}, r"epochs must be an integer of at least 1; got 0\.5"),
        ({"batch_size": 11}, "batch_size must be an integer from 1 to 10; got 11"),
        ({"classes_per_task": 1}, "classes_per_task must be an integer from 2 to 7; got 1"),
        ({"classes_per_task": 8}, "classes_per_task must be an integer from 2 to 7; got 8"),
        (
            {"train_per_class": 7},
            r"train_per_class \+ test_per_class must be at most the examples of each class of 'toy': class 0 has 8; "
            r"got 7 \+ 2",
        ),
    ],
)
def test_settings_out_of_range_are_refused(dataset, change, message):
    given = {"train_per_class": TRAIN, "test_per_class": TEST, "epochs": EPOCHS, "batch_size": BATCH}
    with pytest.raises(ValueError, match=message):
        continual_images(dataset, **{**given, **change})
