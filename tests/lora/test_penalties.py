import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax import lora

PARAMS = {
    "dense": {"kernel": jnp.zeros((6, 5))},
    "query": {"kernel": jnp.zeros((6, 2, 4))},
    "conv": jnp.zeros((3, 2, 4)),
}


def make(seed, rank=2, **settings):
    rng = np.random.default_rng(seed)
    adapter = lora.init(PARAMS, seed, rank=rank, **settings)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), adapter)


def matrices(adapter):
    for factors in adapter.factors.values():
        a, b = (np.asarray(factors[name], np.float64) for name in ("lora_A", "lora_B"))
        yield a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def test_l1_of_changes_and_of_factors():
    adapter = make(0, alpha=6)
    expected = sum(np.abs(3 * a @ b).sum() for a, b in matrices(adapter))
    np.testing.assert_allclose(lora.l1(adapter), expected, rtol=1e-5)
    np.testing.assert_allclose(
        lora.l1(adapter), sum(jnp.abs(d).sum() for d in jax.tree.leaves(lora.delta(adapter))), 1e-5
    )
    expected = sum(np.abs(a).sum() + np.abs(b).sum() for a, b in matrices(adapter))
    np.testing.assert_allclose(lora.l1(adapter, of="factors"), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="of must be 'delta' or 'factors', got 'B'"):
        lora.l1(adapter, of="B")


def test_l1_leaves_a_fresh_adapter_alone_and_shrinks_another():
    fresh = lora.init(PARAMS, 0, rank=2)
    grads = jax.jit(jax.grad(lora.l1))
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads(fresh)))
    adapter = make(0)
    moved = jax.tree.map(lambda leaf, grad: leaf - 1e-3 * grad, adapter, grads(adapter))
    assert lora.l1(moved) < lora.l1(adapter)


def test_orthogonality_of_the_program_and_of_the_paper():
    new, old, older = make(0), make(1), make(2, rank=3)
    absolute = squared = 0.0
    for previous in (old, older):
        for (a_old, _), (a_new, _) in zip(matrices(previous), matrices(new), strict=True):
            absolute += np.abs(a_old.T @ a_new).sum()
            squared += np.linalg.norm(a_old.T @ a_new) ** 2
    np.testing.assert_allclose(lora.orthogonality(new, [old, older]), absolute, rtol=1e-5)
    np.testing.assert_allclose(lora.orthogonality(new, [old, older], form="squared"), squared, rtol=1e-5)


def test_orthogonality_compares_input_directions_and_moves_only_the_new_adapter():
    new, old = make(0), make(1)
    to_new, to_old = jax.grad(lora.orthogonality, (0, 1))(new, old)
    for factors in to_new.factors.values():
        assert factors["lora_A"].any() and not factors["lora_B"].any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(to_old))
    halves = [np.zeros((6, 2), np.float32) for _ in range(2)]
    halves[0][:2], halves[1][2:4] = np.eye(2), np.eye(2)
    apart = [lora.init({"w": jnp.zeros((6, 3))}, 0, rank=2) for _ in halves]
    apart = [one.replace(factors={"w": {**one.factors["w"], "lora_A": jnp.asarray(half)}})
             for one, half in zip(apart, halves, strict=True)]  # fmt: skip
    assert lora.orthogonality(*apart) == 0 == lora.subspace_overlap(*apart)


def test_overlap_is_of_subspaces_not_of_their_bases():
    one = make(0)
    turned = jax.tree.map(lambda leaf: leaf, one)
    rotation = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2)), jnp.float32)
    for path, factors in one.factors.items():
        turned.factors[path] = {**factors, "lora_A": factors["lora_A"] @ rotation}
    np.testing.assert_allclose(lora.subspace_overlap(turned, one), 1, rtol=1e-4)
    cosines = []
    for (a, _), (b, _) in zip(matrices(make(1)), matrices(one), strict=True):
        singular = np.linalg.svd(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0], compute_uv=False)
        cosines.append((singular**2).mean())
    np.testing.assert_allclose(lora.subspace_overlap(make(1), one), np.mean(cosines), rtol=1e-4)


def test_random_subspaces_share_what_chance_gives():
    adapters = [lora.init({"w": jnp.zeros((100, 3))}, seed, rank=4) for seed in range(40)]
    found = [float(lora.subspace_overlap(a, b)) for a, b in zip(adapters[::2], adapters[1::2], strict=True)]
    np.testing.assert_allclose(np.mean(found), 4 / 100, atol=0.01)


def test_bad_input():
    with pytest.raises(ValueError, match="form must be 'absolute' or 'squared', got 'cubed'"):
        lora.orthogonality(make(0), make(1), form="cubed")
    with pytest.raises(ValueError, match=r"previous must adapt some of the kernels \['conv'"):
        lora.orthogonality(make(0), lora.init({"w": jnp.ones((2, 2))}, 0, rank=1))
