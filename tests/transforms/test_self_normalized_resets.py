"""self_normalized_resets against an independent NumPy implementation, and its edge cases."""

import following
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from reference import Dense

import cbp_jax
from cbp_jax.units import Consumer, ParamSlice, UnitGroup

STEPS = 120
LAYERS = (Dense(8, "relu"), Dense(7, "relu"), Dense(3))
SETTINGS = {"rejection": 0.13, "every": 30, "max_silence": 14}


class Silences:
    """The rule in plain Python, with lists of silences instead of histograms."""

    def __init__(self, *, rejection, every, max_silence):
        self.rejection, self.every, self.max_silence, self.layers = rejection, every, max_silence, {}
        self.kinds = set()  # kinds of computed thresholds

    def __call__(self, count, k, h, gradient=None):
        units = self.layers.setdefault(
            k, [{"silence": 0, "threshold": self.max_silence, "past": []} for _ in range(h.shape[-1])]
        )
        reset = np.zeros(len(units), bool)
        for i, unit in enumerate(units):
            if (h[..., i] > 0).any():
                unit["past"] += [unit["silence"]] if unit["silence"] else []
                unit["silence"] = 0
            else:
                unit["silence"] += 1
            if unit["silence"] >= unit["threshold"]:
                unit["past"].append(unit["silence"])
                unit["silence"], reset[i] = 0, True
            if count % self.every == 0 and unit["past"]:
                past, q = np.array(unit["past"]), 1
                while (past >= q).mean() > self.rejection:
                    q += 1
                self.kinds.add("shorter" if q < unit["threshold"] else "longer")
                unit["threshold"] = q if q < unit["threshold"] else min(2 * unit["threshold"], self.max_silence)
                unit["past"] = []
        return reset


def test_follows_the_numpy_reference():
    inner, optimizer = cbp_jax.adam(3e-3), reference.PerWeightAdam(3e-3)
    select = Silences(**SETTINGS)
    make = lambda units: cbp_jax.self_normalized_resets(inner, units, key=5, **SETTINGS)
    assert following.follow(LAYERS, (5,), make, optimizer, select, steps=STEPS, batch=2, seed=0) >= 8
    assert select.kinds == {"shorter", "longer"}


SIZE = 6
PARAMS = {
    name: jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    for name, shape in {"w1": (4, SIZE), "b1": (SIZE,), "w2": (SIZE, 2)}.items()
}
UNITS = (
    UnitGroup(
        "hidden",
        SIZE,
        incoming=(ParamSlice.whole_axis("w1", 1, SIZE),),
        biases=(ParamSlice.whole_axis("b1", 0, SIZE),),
        outgoing=(Consumer(ParamSlice.whole_axis("w2", 0, SIZE)),),
    ),
)


def run(fires, **settings):
    """Update with the units that fire, bool [steps, units]; return the units that are reset, and the last state."""
    tx = cbp_jax.self_normalized_resets(optax.sgd(0.1), UNITS, **settings)

    def step(state, fires):
        features = {"hidden": jnp.stack([-jnp.ones(SIZE), jnp.where(fires, 2.0, 0.0)])}
        _, state = tx.update(PARAMS, state, PARAMS, features=features)
        return state, state.replaced["hidden"]

    state, replaced = jax.jit(lambda fires: jax.lax.scan(step, tx.init(PARAMS), fires))(fires)
    return np.asarray(replaced), state


def test_rarely_firing_units_get_more_time_than_busy_ones():
    """A silence that is usual for one unit resets another unit that used to fire more often."""
    steps = np.arange(1, 41)
    period = np.array([2, 2, 4, 4, 8, 8])
    fires = steps[:, None] % period == 0
    fires[32:, ::2] = False  # every second unit falls silent permanently
    replaced, state = run(fires, rejection=0.1, every=32, max_silence=12)
    first = [np.flatnonzero(column)[0] + 1 if column.any() else None for column in replaced.T]
    # Units usually have silences of 1, 3 and 7 updates, so that longer ones are improbable.
    assert first == [34, None, 36, None, 40, None]
    assert state.threshold["hidden"].tolist() == [2, 2, 4, 4, 8, 8]


def test_units_without_a_past_keep_their_threshold():
    always, never = np.ones((12, SIZE), bool), np.zeros((12, SIZE), bool)
    replaced, state = run(np.concatenate([always, never]), rejection=0.5, every=6, max_silence=9)
    assert np.flatnonzero(replaced.any(1)).tolist() == [12 + 9 - 1] and replaced[20].all()
    assert state.silence["hidden"].tolist() == [3] * SIZE


def test_resets_above_the_maximum_wait_and_the_most_overdue_come_first():
    fires = np.zeros((9, SIZE), bool)
    fires[1, :2], fires[:, 5] = True, True
    replaced, _ = run(fires, max_silence=4, max_resets=1)
    # Units 2, 3 and 4 are due at update 4; units 0 and 1, which fired in update 2, at 6, when 4 still waits.
    assert [np.flatnonzero(row).tolist() for row in replaced] == [[], [], [], [2], [3], [4], [0], [1], [2]]


def test_a_unit_that_fires_while_it_waits_is_spared():
    fires = np.zeros((6, SIZE), bool)
    fires[4, 1:] = True
    replaced, _ = run(fires, max_silence=4, max_resets=1)
    assert [np.flatnonzero(row).tolist() for row in replaced] == [[], [], [], [0], [], []]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rejection": 1.5}, r"rejection must be in \[0, 1\], got 1.5"),
        ({"every": 0.5}, r"every must be in \[1, inf\), got 0.5"),
        ({"max_silence": 0}, "max_silence must be a positive int, got 0"),
        ({"max_silence": 3.0}, r"max_silence must be a positive int, got 3\.0"),
        ({"max_resets": 0}, "max_resets must be a positive int or None, got 0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        cbp_jax.self_normalized_resets(optax.sgd(0.1), UNITS, **settings)
