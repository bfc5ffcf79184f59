import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.data import Dataset
from cbp_jax.problems import class_incremental

CLASSES, EACH, TRAIN, VALIDATION, TEST, BATCH = 6, 10, 5, 2, 3, 4
SETTINGS = {
    "classes_per_increment": 2,
    "train_per_class": TRAIN,
    "validation_per_class": VALIDATION,
    "test_per_class": TEST,
    "batch_size": BATCH,
    "flip": False,
    "padding": 0,
    "max_rotation": 0.0,
}


def images_of(classes, each, seed=0):
    """Make shuffled images. All pixels are 20 times the class plus the image's number within its class."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), each)).astype(np.int32)
    place = np.zeros(len(labels), int)
    for number in range(classes):
        place[labels == number] = np.arange(each)
    values = (20 * labels + place).astype(np.uint8)
    return Dataset(np.broadcast_to(values[:, None, None, None], (len(labels), 3, 4, 1)).copy(), labels, classes, "toy")


@pytest.fixture(scope="module")
def problem():
    return class_incremental(images_of(CLASSES, EACH), **SETTINGS)


@pytest.fixture(scope="module")
def show(problem):
    @jax.jit
    def epoch(data, key, index, epoch):
        task = problem.make_task(data, key, index)
        order = problem.order(data, task, epoch)
        return task, order, jax.vmap(lambda step: problem.batch(data, task, epoch, order, step))(jnp.arange(7))

    return lambda key, index, number: epoch(problem.data, key, index, number)


def identities(inputs):
    """Return class and number of each example."""
    values = np.rint(np.asarray(inputs)[..., 0, 0, 0].ravel() * 255).astype(int)
    return [(value // 20, value % 20) for value in values.tolist()]


def test_classes_are_added_in_an_order_that_the_key_determines(show, problem):
    tasks = [show(jax.random.key(0), index, 0)[0] for index in range(3)]
    assert problem.increments == 3 and problem.num_classes == CLASSES
    classes = tasks[0].classes.tolist()
    assert sorted(classes) == list(range(CLASSES))
    for index, task in enumerate(tasks):
        assert task.classes.tolist() == classes and int(task.count) == 2 * (index + 1)
        assert set(np.flatnonzero(task.seen)) == set(classes[: 2 * (index + 1)])
        assert int(problem.steps(task)) == (index + 1) * 2 * TRAIN // BATCH
    orders = {tuple(show(jax.random.key(seed), 0, 0)[0].classes.tolist()) for seed in range(4)}
    assert len(orders) > 1


def test_an_epoch_shows_the_training_examples_of_the_classes_so_far_in_a_fresh_order(show, problem):
    shown = []
    for epoch in (0, 1):
        task, order, (x, y) = show(jax.random.key(1), 1, epoch)
        assert sorted(order.tolist()) == list(range(CLASSES * TRAIN))
        steps = int(problem.steps(task))
        assert steps == 5 and x.dtype == jnp.float32 and y.dtype == jnp.int32
        examples = identities(x[:steps])
        allowed = {(n, place) for n in task.classes[:4].tolist() for place in range(VALIDATION, VALIDATION + TRAIN)}
        assert set(examples) == allowed and len(examples) == len(allowed) == 20
        assert [number for number, _ in examples] == y[:steps].ravel().tolist()
        shown.append(examples)
    assert shown[0] != shown[1]


def test_held_out_examples_are_never_trained_on(problem):
    held_out = jax.jit(problem.held_out, static_argnums=1)
    for split, places in (("validation", range(VALIDATION)), ("test", range(VALIDATION + TRAIN, EACH))):
        x, y = held_out(problem.data, split, 3)
        assert identities(x) == [(3, place) for place in places] and y.tolist() == [3] * len(places)
    separate = class_incremental(images_of(CLASSES, 7), images_of(CLASSES, 4, seed=1), **SETTINGS)
    x, _ = separate.held_out(separate.data, "test", 2)
    assert identities(x) == [(2, place) for place in range(TEST)]


def test_networks_are_measured_on_the_classes_to_come(show, problem):
    task = show(jax.random.key(2), 2, 0)[0]
    x, y = problem.evaluation(problem.data, task, 9)
    examples = identities(x)
    assert len(set(examples)) == 9 and {number for number, _ in examples} == set(task.classes[4:6].tolist())
    assert [number for number, _ in examples] == y.tolist()
    assert all(VALIDATION <= place < VALIDATION + TRAIN for _, place in examples)


def test_only_training_images_are_augmented():
    images = Dataset(
        np.random.default_rng(0).integers(0, 256, (30, 6, 6, 1), dtype=np.uint8),
        np.repeat(np.arange(2, dtype=np.int32), 15),
        2,
        "toy",
    )
    problem = class_incremental(images, **{**SETTINGS, "flip": True, "padding": 2}, normalize=(0.5, 0.5))
    task = problem.make_task(problem.data, jax.random.key(0), 0)
    known = {tuple(row) for row in ((images.images.reshape(30, -1) / 255 - 0.5) / 0.5).round(3).tolist()}
    order = problem.order(problem.data, task, 0)
    batch = jax.jit(problem.batch)
    first, second = (batch(problem.data, task, epoch, order, 0)[0].reshape(4, -1) for epoch in (0, 1))
    assert sum(tuple(row) in known for row in np.asarray(first, float).round(3).tolist()) < 4
    assert not np.array_equal(first, second)  # an image looks different in another epoch
    kept = np.asarray(problem.held_out(problem.data, "test", 1)[0].reshape(TEST, -1), float).round(3).tolist()
    assert all(tuple(row) in known for row in kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes_per_increment": 7}, "classes_per_increment must be an integer from 1 to 6; got 7"),
        ({"classes_per_increment": 4}, "num_classes must be a multiple of classes_per_increment = 4; got 6"),
        ({"num_classes": 8}, "num_classes must be an integer from 1 to 6; got 8"),
        ({"batch_size": 11}, "batch_size must be an integer from 1 to 10; got 11"),
        ({"padding": 3}, "padding must be an integer from 0 to 2; got 3"),
        ({"max_rotation": -1.0}, r"max_rotation must not be negative; got -1\.0"),
        (
            {"validation_per_class": 11},
            "validation_per_class must be at most what each class of 'toy' has; got 11, and",
        ),
        ({"train_per_class": 9}, "train_per_class must be .*; got 9, and class 0 has 8 after the 2 before them"),
        ({"test_per_class": 4}, "test_per_class must be .*; got 4, and class 0 has 3 after the 7 before them"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        class_incremental(images_of(CLASSES, EACH), **{**SETTINGS, **change})


def test_features_are_refused():
    features = Dataset(np.zeros((4, 3), np.float32), np.zeros(4, np.int32), 1, "vectors")
    with pytest.raises(ValueError, match="dataset and test must hold images of one size"):
        class_incremental(features)
