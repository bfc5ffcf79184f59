import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

from cbp_jax import stops
from cbp_jax.files import partial
from cbp_jax.training import Checkpoint, TrainState, checkpoint


def state_of(scale=1.0, width=3):
    """Make the state of two lanes: named tuples in chains, empty states, keys, counts, and several dtypes."""
    params = {"params": {"Dense_0": {"kernel": scale * np.arange(2 * width, dtype=np.float32).reshape(2, width)}}}
    moments = optax.ScaleByAdamState(np.array([3, 4], np.int32), params, params)
    noise = {"key": np.array([[1, 2], [3, 2**32 - 1]], np.uint32), "mask": np.array([True, False])}
    half = {"half": np.asarray(jnp.asarray([scale, 1 / 3], jnp.bfloat16))}
    opt_state = (moments, optax.EmptyState(), (noise, half))
    return TrainState(params, opt_state, noise["key"], {"step_size": np.ones(2, np.float32)}, np.zeros(2, np.int32))


def never():
    raise AssertionError("the state was asked for")


@pytest.fixture
def clock(monkeypatch):
    """Stop the clock; tests advance it by adding to `clock.now`."""
    time = types.SimpleNamespace(now=100.0, monotonic=lambda: time.now)
    monkeypatch.setattr(checkpoint, "time", time)
    return time


def test_a_state_comes_back_with_its_structure_types_and_bits(tmp_path):
    Checkpoint(tmp_path / "state", "bp; bp(2)", every=0.0).save(7, state_of)
    found = Checkpoint(tmp_path / "state", "bp; bp(2)")
    assert found.tasks == 7
    state = found.restore(state_of(scale=0.0))
    assert jax.tree.structure(state) == jax.tree.structure(state_of())
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_of()), strict=True):
        assert leaf.dtype == expected.dtype and leaf.tobytes() == expected.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_without_a_saved_state_a_run_starts_from_its_initial_state(tmp_path):
    none = Checkpoint(tmp_path / "state", "bp")
    like = state_of()
    assert none.tasks == 0 and none.restore(like) is like
    none.delete()  # there is no file, and no error


def test_a_state_of_another_name_is_not_restored_and_the_next_save_replaces_it(tmp_path):
    Checkpoint(tmp_path / "state", "bp", every=0.0).save(7, state_of)
    other = Checkpoint(tmp_path / "state", "cbp", every=0.0)
    like = state_of(scale=3.0)
    assert other.tasks == 0 and other.restore(like) is like
    other.save(1, lambda: like)
    assert (Checkpoint(tmp_path / "state", "cbp").tasks, Checkpoint(tmp_path / "state", "bp").tasks) == (1, 0)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (state_of(width=4), r"kernel'\] is float32\[2, 3\] there, and float32\[2, 4\] here\. .* Delete the file"),
        (
            jax.tree.map(lambda x: np.asarray(x, np.float16) if x.dtype == np.float32 else x, state_of()),
            r"is float32\[2, 3\] there, and float16\[2, 3\] here\. .* Delete the file",
        ),
        (state_of()._replace(opt_state=(optax.EmptyState(),)), "size|keys|fields"),
        (state_of()._replace(hyperparameters={"l2": np.ones(2, np.float32)}), "keys"),
    ],
    ids=["shape", "type", "chain", "names"],
)
def test_a_state_of_another_run_is_refused(tmp_path, like, message):
    Checkpoint(tmp_path / "state", "bp", every=0.0).save(7, state_of)
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path / "state", "bp").restore(like)


def test_a_state_is_saved_when_it_is_due(tmp_path, clock):
    path, calls = tmp_path / "state", []
    saving = Checkpoint(path, "bp", every=30.0, before=lambda: calls.append(path.exists()))
    clock.now += 29.0
    saving.save(1, never)
    assert calls == [] and not path.exists()
    clock.now += 1.0
    saving.save(2, state_of)
    clock.now += 29.0
    saving.save(3, never)
    clock.now += 1.0
    saving.save(4, lambda: state_of(scale=2.0))
    # Results are saved before the state, so that they are never behind it.
    assert calls == [False, True]
    found = Checkpoint(path, "bp")
    assert found.tasks == 4
    kernel = found.restore(state_of()).params["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel, state_of(scale=2.0).params["params"]["Dense_0"]["kernel"])


def test_saves_take_at_most_a_twentieth_of_the_time(tmp_path, clock):
    def slow():
        clock.now += 5.0
        return state_of()

    saving = Checkpoint(tmp_path / "state", "bp", every=30.0)
    clock.now += 30.0
    saving.save(1, slow)
    clock.now += 99.0
    saving.save(2, never)
    clock.now += 1.0
    saving.save(3, state_of)
    every_task = Checkpoint(tmp_path / "state", "bp", every=0.0)
    for task in (1, 2):
        every_task.save(task, slow)
    assert Checkpoint(tmp_path / "state", "bp").tasks == 2  # with every=0, every task is saved


def test_a_stop_waits_for_a_save_that_is_not_put_off(tmp_path):
    path = tmp_path / "state"
    with stops.held_back(print) as held:
        saving = Checkpoint(path, "bp", every=30.0, stops=held)
        saving.save(1, never)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            saving.save(2, state_of)
    assert Checkpoint(path, "bp").tasks == 2


@pytest.mark.parametrize("broken", ["before", "state", "write"])
def test_an_interrupted_save_leaves_the_last_state(tmp_path, monkeypatch, broken):
    def stop(*_):
        raise KeyboardInterrupt

    path = tmp_path / "state"
    saving = Checkpoint(path, "bp", every=0.0)
    saving.save(1, state_of)
    if broken == "before":
        saving.before = stop
    if broken == "write":
        monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        saving.save(2, stop if broken == "state" else state_of)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert Checkpoint(path, "bp").tasks == 1


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: flipped(content, len(content) // 2), "it is damaged, as its checksum shows"),
        (lambda content: flipped(content, -5), "it is damaged, as its checksum shows"),
        (lambda content: flipped(content, 20), "it is damaged, as its checksum shows"),
        (lambda content: flipped(content, 3), "it is damaged, or no state of a run"),
        (lambda content: content[:-1], "it is damaged, as its checksum shows"),
        (lambda content: content[:30], "it is damaged, as its checksum shows"),
        (lambda content: b"", "it is damaged, or no state of a run"),
        (lambda content: b"years of work", "it is damaged, or no state of a run"),
        (lambda content: serialization.msgpack_serialize({"speed": 3}), "it is damaged, or no state of a run"),
        (
            lambda content: serialization.msgpack_serialize({"name": "bp", "tasks": 7, "state": {}}),
            "or was written by an earlier version",
        ),
    ],
    ids=["bit", "last bits", "checksum", "head", "cut", "cut short", "empty", "text", "foreign", "no checksum"],
)
def test_a_damaged_or_foreign_file_is_kept_and_the_error_says_what_to_do(tmp_path, damage, reason):
    path = tmp_path / "state"
    Checkpoint(path, "bp", every=0.0).save(7, state_of)
    path.write_bytes(damage(path.read_bytes()))
    damaged = path.read_bytes()
    for name in ("bp", "cbp"):
        with pytest.raises(
            ValueError, match=f"cannot resume from {path}: .*{reason}.* results .* are safe. Delete the"
        ):
            Checkpoint(path, name)
    assert path.read_bytes() == damaged


def test_a_state_is_refused_without_the_results_that_it_needs(tmp_path):
    path = tmp_path / "state"
    Checkpoint(path, "bp", every=0.0, needs=lambda tasks: b"results of %d" % tasks).save(7, state_of)
    assert Checkpoint(path, "bp", needs=lambda tasks: b"results of 7").tasks == 7
    assert Checkpoint(path, "cbp", needs=lambda tasks: b"others").tasks == 0  # of other methods
    with pytest.raises(ValueError, match=f"{path}: the results next to it are not those of its 7 tasks"):
        Checkpoint(path, "bp", needs=lambda tasks: b"others")


def test_a_full_disk_is_reported_and_leaves_the_last_state(tmp_path):
    path = tmp_path / "state"
    saving = Checkpoint(path, "bp", every=0.0)
    saving.save(1, state_of)
    partial(path).symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"{path} cannot be written: no space left on device"):
        saving.save(2, state_of)
    assert [path.name for path in tmp_path.iterdir()] == ["state"] and Checkpoint(path, "bp").tasks == 1


def test_deleting_also_removes_files_of_an_interrupted_save(tmp_path):
    saving = Checkpoint(tmp_path / "state", "bp", every=0.0)
    saving.save(1, state_of)
    (tmp_path / ".state.part").write_bytes(b"half of a file")
    saving.delete()
    assert list(tmp_path.iterdir()) == []
