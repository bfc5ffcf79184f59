import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.problems import regression, slowly_changing_regression

PAPER = slowly_changing_regression()
SMALL = slowly_changing_regression(
    num_inputs=6, flipping_bits=4, examples_per_task=12, target_units=9, beta=0.5, batch_size=3
)
MAKE, MAKE_SMALL = jax.jit(PAPER.make_task), jax.jit(SMALL.make_task)


@pytest.fixture(scope="module")
def tasks():
    """Make the first 601 tasks of a stream, more than two blocks of flips."""
    make = jax.jit(jax.vmap(lambda index: PAPER.make_task((), jax.random.key(0), index)))
    return make(jnp.arange(601))


def test_the_papers_sizes():
    assert (PAPER.input_shape, PAPER.num_classes, PAPER.steps_per_task) == ((21,), 1, 10_000)
    assert PAPER.loss == "squared_error" and jax.tree.leaves(PAPER.data) == []
    assert SMALL.steps_per_task == 4


def test_one_bit_flips_between_tasks(tasks):
    bits = np.asarray(tasks.bits)
    assert bits.shape == (601, 15) and set(np.unique(bits)) == {0, 1}
    changed = bits[1:] != bits[:-1]
    assert (changed.sum(1) == 1).all()
    # Flips are uniform: 40 of each bit are expected, with a standard deviation of 6.1.
    counts = changed.sum(0)
    assert ((counts - 40) ** 2 / 40).sum() < 36.1  # chi-squared with 14 degrees of freedom, exceeded 1 time in 1,000
    # They are independent of the previous flip: the same bit flips again 1 time in 15, 40 times in 599.
    flipped = changed.argmax(1)
    assert 20 <= (flipped[1:] == flipped[:-1]).sum() <= 62


def test_all_bits_are_redrawn_on_request(tasks):
    problem = slowly_changing_regression(redraw=True)
    make = jax.jit(jax.vmap(lambda index: problem.make_task((), jax.random.key(0), index)))
    redrawn = make(jnp.arange(601))
    bits = np.asarray(redrawn.bits)
    changed = (bits[1:] != bits[:-1]).sum(1)
    assert abs(changed.mean() - 7.5) < 4 * (15 / 4 / 600) ** 0.5 and changed.max() > 10
    assert (np.abs(bits.mean(0) - 0.5) < 0.1).all()
    np.testing.assert_array_equal(redrawn.input_weights, tasks.input_weights)  # the target is the same


def test_streams_start_from_random_bits():
    keys = jax.random.split(jax.random.key(1), 400)
    first = jax.jit(jax.vmap(lambda key: PAPER.make_task((), key, 0).bits))(keys)
    assert (np.abs(np.asarray(first).mean(0) - 0.5) < 0.1).all()  # 4 standard deviations


def test_a_task_can_be_made_alone(tasks):
    for index in (0, 255, 256, 257, 600):
        alone = MAKE((), jax.random.key(0), index)
        for ours, theirs in zip(alone[:4], tasks[:4], strict=True):
            np.testing.assert_array_equal(ours, theirs[index])


def test_counting_flips_in_blocks(monkeypatch):
    monkeypatch.setattr(regression, "_BLOCK", 4)
    key = jax.random.key(3)
    drawn = [jax.random.randint(jax.random.fold_in(key, number), (4, 1), 0, 5).ravel() for number in range(3)]
    flips = jax.jit(regression._flips, static_argnums=2)
    for count in (0, 1, 3, 4, 5, 9):
        expected = np.bincount(np.concatenate(drawn)[:count], minlength=5)
        np.testing.assert_array_equal(flips(key, count, 5), expected)


def test_the_target_network_is_fixed_and_its_weights_are_signs(tasks):
    for name in ("input_weights", "thresholds", "output_weights"):
        array = np.asarray(getattr(tasks, name))
        assert (array == array[:1]).all(), name
    assert tasks.input_weights.shape[1:] == (21, 100) and tasks.output_weights.shape[1:] == (100,)
    weights = np.asarray(tasks.input_weights[0])
    assert set(np.unique(weights)) == set(np.unique(tasks.output_weights[0])) == {-1, 1}
    assert abs(weights.mean()) < 0.1  # 4.6 standard deviations
    np.testing.assert_allclose(tasks.thresholds[0], 21 * 0.7 - (weights < 0).sum(0), rtol=1e-6)
    other = MAKE((), jax.random.key(1), 0)
    assert (np.asarray(other.input_weights) != weights).mean() > 0.4


def test_examples_of_a_task():
    task = MAKE_SMALL((), jax.random.key(4), 2)
    batches = [jax.jit(SMALL.batch)((), task, step) for step in range(SMALL.steps_per_task)]
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert x.shape == (12, 7) and y.shape == (12, 1) and x.dtype == y.dtype == np.float32
    assert (x[:, :4] == np.asarray(task.bits)).all()
    assert (x[:, -1] == 1).all()
    eager = SMALL.batch((), task, 1)
    np.testing.assert_array_equal(batches[1][0], eager[0])
    np.testing.assert_array_equal(batches[1][1], eager[1])
    # One unit at a time: it is on where more than beta * 7 = 3.5 of its inputs agree with its weights.
    v, w = np.asarray(task.input_weights), np.asarray(task.output_weights)
    for example, target in zip(x, y[:, 0], strict=True):
        agree = [sum(v[i, unit] == (1 if example[i] else -1) for i in range(7)) for unit in range(9)]
        assert target == sum(w[unit] for unit in range(9) if agree[unit] > 3.5)
    assert len(set(y[:, 0].tolist())) > 1


def test_random_bits_are_uniform_and_independent():
    task = MAKE((), jax.random.key(0), 0)
    x, y = jax.jit(PAPER.evaluation, static_argnums=2)((), task, 3200)
    numbers = np.asarray(x)[:, 15:20] @ (2 ** np.arange(5))
    counts = np.bincount(numbers.astype(int), minlength=32)
    assert ((counts - 100) ** 2 / 100).sum() < 61.1  # chi-squared with 31 degrees of freedom, exceeded 1 time in 1,000
    np.testing.assert_array_equal(x[:, :15], np.broadcast_to(task.bits, (3200, 15)))
    steps = jax.jit(jax.vmap(lambda step: PAPER.batch((), task, step)[0]))(jnp.arange(3200))
    counts = np.bincount((np.asarray(steps)[:, 0, 15:20] @ (2 ** np.arange(5))).astype(int), minlength=32)
    assert ((counts - 100) ** 2 / 100).sum() < 61.1
    assert y.shape == (3200, 1)


def test_tasks_draw_their_own_bits():
    make = lambda index: MAKE_SMALL((), jax.random.key(0), index)
    evaluation = jax.jit(SMALL.evaluation, static_argnums=2)
    random_bits = [np.asarray(evaluation((), make(index), 20)[0])[:, 4:6] for index in range(2)]
    assert (random_bits[0] != random_bits[1]).any()


def test_seeds_equal_their_solo_runs():
    keys, indices = jax.random.split(jax.random.key(0), 3), jnp.array([0, 300, 7])

    @jax.jit
    def batches(keys, indices):
        tasks = jax.vmap(SMALL.make_task, in_axes=(None, 0, 0))((), keys, indices)
        return jax.vmap(SMALL.batch, in_axes=(None, 0, None))((), tasks, 2)

    x, y = batches(keys, indices)
    batch = jax.jit(SMALL.batch)
    for row in range(3):
        alone = batch((), MAKE_SMALL((), keys[row], indices[row]), 2)
        np.testing.assert_array_equal(x[row], alone[0])
        np.testing.assert_array_equal(y[row], alone[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inputs": 0}, "num_inputs must be an integer of at least 1; got 0"),
        ({"flipping_bits": 21}, "flipping_bits must be an integer from 1 to 20; got 21"),
        ({"examples_per_task": 1e4}, r"examples_per_task must be an integer of at least 1; got 10000\.0"),
        ({"target_units": -1}, "target_units must be an integer of at least 1; got -1"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\]; got 1\.5"),
        ({"batch_size": 10_001}, "batch_size must be an integer from 1 to 10000; got 10001"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        slowly_changing_regression(**settings)
