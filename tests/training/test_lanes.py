import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax.training import Lanes, one_blas_thread

MODES = ("vmap", "map")


def work(shared, lane, offset):
    """Compute with integers, so that results are equal to the last bit in any program; add noise for each lane."""
    product = shared @ lane["weights"] + offset
    noise = jax.random.uniform(jax.random.wrap_key_data(lane["key"]))
    return {"product": product, "noise": noise}


def arguments(count):
    rng = np.random.default_rng(count)
    shared = rng.integers(-9, 9, (3, 4)).astype(np.float32)
    lane = {
        "weights": rng.integers(-9, 9, (count, 4, 2)).astype(np.float32),
        "key": rng.integers(0, 2**32, (count, 2), dtype=np.uint32),
    }
    return shared, lane, np.arange(count, dtype=np.float32)


def run(lanes, shared, *lane_args):
    out = lanes.jit(work)(lanes.share(shared), *(lanes.scatter(jax.tree.map(jnp.asarray, arg)) for arg in lane_args))
    return lanes.gather(out), out


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("mode", MODES)
def test_every_lane_equals_its_solo_run(mode):
    shared, lane, offset = arguments(3)
    together, _ = run(Lanes(3, mode), shared, lane, offset)
    assert together["product"].shape == (3, 3, 2) and together["noise"].shape == (3,)
    for row in range(3):
        assert_same(
            jax.tree.map(lambda array, row=row: array[row], together),
            jax.tree.map(np.asarray, work(shared, jax.tree.map(lambda array, row=row: array[row], lane), offset[row])),
        )
    assert len(set(together["noise"])) == 3


def test_map_runs_a_lane_of_a_device_at_a_time_and_vmap_all_in_one_call():
    device = jax.devices()[:1]
    calls = {mode: Lanes(3, mode, device).scatter({"x": jnp.arange(3.0)}) for mode in MODES}
    assert [chunk["x"].tolist() for chunk in calls["vmap"]] == [[0.0, 1.0, 2.0]]
    assert [chunk["x"].tolist() for chunk in calls["map"]] == [[0.0], [1.0], [2.0]]
    assert Lanes(3).mode == ("map" if jax.default_backend() == "cpu" else "vmap")


@pytest.mark.parametrize("mode", MODES)
def test_lanes_that_wait_on_the_host_give_the_same_results_with_one_program(mode):
    every = arguments(7)
    together, _ = run(Lanes(7, mode, jax.devices()[:1]), *every)
    lanes = Lanes(7, mode, jax.devices()[:1], at_once=3)
    in_batches, out = run(lanes, *every)
    assert_same(together, in_batches)
    assert {len(chunk["noise"]) for chunk in out} == ({3} if mode == "vmap" else {1})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(out))  # they are not on a device
    assert len(Lanes(8, "vmap", jax.devices()[:1], at_once=5).scatter(np.arange(8))) == 2
    traces = []
    step = lanes.jit(lambda shared, lane: traces.append(None) or shared * lane, donate_lane=0)
    once = step(lanes.share(jnp.float32(2)), lanes.scatter(jnp.arange(7.0)))
    assert lanes.gather(step(lanes.share(jnp.float32(2)), once)).tolist() == [4.0 * lane for lane in range(7)]
    assert len(traces) == 1


def test_all_calls_share_one_compilation():
    traces = []
    lanes = Lanes(5, "map")
    step = lanes.jit(lambda shared, lane: traces.append(None) or shared * lane)
    for _ in range(2):
        out = lanes.gather(step(lanes.share(jnp.float32(2)), lanes.scatter(jnp.arange(5.0))))
    assert out.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0] and len(traces) == 1


def test_programs_that_run_once_give_the_same_bits(exact):
    """Weights of committed results must not depend on how quickly their initialization was compiled."""
    lanes = Lanes(2)
    initializers = (jax.nn.initializers.lecun_normal(), jax.nn.initializers.he_uniform())

    def start(_, seed):
        return [init(jax.random.key(seed), (5, 7 + i)) for i, init in enumerate(initializers)]

    seeds = lanes.scatter(jnp.arange(2))
    assert_same(*(lanes.gather(lanes.jit(start, once=once)((), seeds)) for once in (True, False)))


@pytest.mark.parametrize("mode", MODES)
def test_only_the_donated_argument_is_deleted(mode):
    lanes = Lanes(2, mode)
    step = lanes.jit(lambda shared, kept, given: given + shared * kept, donate_lane=1)
    shared, kept, given = lanes.share(jnp.float32(2)), lanes.scatter(jnp.ones(2)), lanes.scatter(jnp.zeros(2))
    np.testing.assert_array_equal(lanes.gather(step(shared, kept, given)), [2.0, 2.0])
    assert all(chunk.is_deleted() for chunk in given) and not shared.is_deleted()
    assert not any(chunk.is_deleted() for chunk in kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "count must be at least 1, got 0"),
        ((2, "pmap"), "mode must be 'auto', 'vmap' or 'map', got 'pmap'"),
        ((2, "vmap", None, 0), "at_once must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lanes(*arguments)


@pytest.mark.parametrize("rows", [2, 4])
def test_arrays_of_another_length_are_refused(rows):
    with pytest.raises(ValueError, match=str(rows)):
        Lanes(3).scatter(jnp.arange(float(rows)))


def check_two_devices():
    """Run in a separate process, because the number of devices is fixed when JAX starts."""
    first, second = jax.devices()
    for count in (1, 3):
        for mode in MODES:
            one, _ = run(Lanes(count, mode, [first]), *arguments(count))
            lanes = Lanes(count, mode, jax.devices())
            two, out = run(lanes, *arguments(count))
            assert_same(one, two)
            assert two["noise"].shape == (count,)
            # Devices have equal shares, and a device without a lane is not used.
            shares = {device: 0 for device in lanes.mesh.devices}
            for chunk in out:
                for shard in chunk["noise"].addressable_shards:
                    shares[shard.device] += shard.data.shape[0]
            assert shares == ({first: 1} if count == 1 else {first: 2, second: 2}), (mode, count, shares)
    # The padding lane repeats the last one, so that it has no settings that the user did not give.
    filled = [np.asarray(chunk).tolist() for chunk in Lanes(3, "map").scatter(jnp.array([5.0, 6.0, 7.0]))]
    assert filled == [[5.0, 6.0], [7.0, 7.0]]
    assert [len(chunk) for chunk in Lanes(7, "vmap", jax.devices(), at_once=3).scatter(jnp.arange(7.0))] == [2, 2, 2, 2]
    assert_same(
        run(Lanes(7, "vmap", jax.devices(), at_once=3), *arguments(7))[0],
        run(Lanes(7, "vmap", jax.devices()), *arguments(7))[0],
    )
    # On several host devices, batches of decompositions wait for each other.
    assert Lanes(3, "vmap").mesh.size == 1 and Lanes(3, "map").mesh.size == 2
    lanes = Lanes(4, "vmap")
    values = lanes.jit(lambda _, lane: jnp.linalg.svd(lane, compute_uv=False))(
        lanes.share(0), lanes.scatter(np.ones((4, 60, 60), np.float32))
    )
    assert lanes.gather(values).shape == (4, 60)
    everywhere = Lanes(3).share(jnp.arange(5))
    assert {shard.data.shape for shard in everywhere.addressable_shards} == {(5,)}
    assert len(everywhere.addressable_shards) == 2


@pytest.mark.slow
def test_two_devices_share_the_lanes_and_give_the_same_results():
    script = f"""
import jax, runpy
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
runpy.run_path({__file__!r})["check_two_devices"]()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_threads_of_openblas_leave_the_cores_to_the_lanes():
    """OpenBLAS's threads spin while they wait. While lanes run there is only one, and afterwards as many as before."""
    import scipy.linalg.cython_lapack  # noqa: F401
    import threadpoolctl

    count = lambda: [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = count()
        with one_blas_thread():
            assert count() and set(count()) == {1}
        assert count() == before
