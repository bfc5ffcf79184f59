"""Tables, selections by name and kind, and drawings of groups."""

import jax.numpy as jnp
import pytest

import cbp_jax
from cbp_jax import lora
from cbp_jax.units import LeftOutKind, NoUnits


def found():
    params = {
        "conv": jnp.ones((3, 3, 2, 4)), "body": {"first": jnp.ones((4, 6)), "second": jnp.ones((6, 4))},
        "head": jnp.ones((4, 2)),
    }  # fmt: skip

    def apply_fn(params, x):
        x = (x[:, :, :, None, :, None] * jnp.ones(4)).reshape(*x.shape[:-1], -1)[..., :2]
        import jax

        x = jax.lax.conv(x.transpose(0, 3, 1, 2), params["conv"].transpose(3, 2, 0, 1), (1, 1), "SAME").mean((2, 3))
        x = x + jnp.tanh(x @ params["body"]["first"]) @ params["body"]["second"]
        return x @ params["head"]

    return cbp_jax.discover_units(apply_fn, params, jnp.ones((1, 4, 4, 2)))


def test_groups_are_chosen_by_name_and_kind():
    units = found()
    assert [(g.name, g.kind) for g in units] == [("conv", "residual"), ("body/first", "dense")]
    names = lambda chosen: [group.name for group in chosen]
    assert names(units.select()) == ["conv", "body/first"]
    assert names(units.select("body/*")) == ["body/first"]
    assert names(units.select(kind="residual")) == ["conv"]
    assert names(units.select(kind=("residual", "dense"))) == ["conv", "body/first"]
    assert names(units.select("*o*", kind="dense")) == ["body/first"]
    chosen = units.select("conv")
    last = {item.name: item for item in chosen.left_out}["body/first"]
    assert (last.reason, last.kind) == ("it was not selected", LeftOutKind.NOT_SELECTED)
    kernels = ("conv", "body/first", "body/second", "head")  # forward order, not alphabetical order
    assert chosen.kernels == units.kernels == kernels and cbp_jax.Units(tuple(units)).kernels == ()
    with pytest.raises(ValueError, match=r"nothing.*conv"):
        units.select("nothing")
    with pytest.raises(ValueError, match=r"dense.*head"):
        units.select(kind="head")


def test_table_and_drawing_show_kinds_producers_and_consumers():
    units = found()
    header, first, second, *left = str(units).splitlines()
    assert header.split() == ["group", "size", "kind", "incoming", "bias", "outgoing"]
    assert first.split()[:3] == ["conv", "4", "residual"] and second.split()[:3] == ["body/first", "6", "dense"]
    assert [line.startswith("left out: ") for line in left] == [True]
    lines = units.to_dot().splitlines()
    assert lines[0] == "digraph units {" and lines[-1] == "}"
    for edge in ('"conv" -> "group conv"', '"body/second" -> "group conv"', '"group body/first" -> "body/second"'):
        assert f"  {edge};" in lines


def test_long_cells_of_the_table_are_cut():
    width = {str(number): jnp.ones((3, 3)) for number in range(6)}

    def apply_fn(params, x):
        for layer in range(5):
            x = x @ params["0"] if layer == 0 else x + jnp.tanh(x @ params[str(layer)])
        return x @ params["5"]

    table = str(cbp_jax.discover_units(apply_fn, width, jnp.ones((1, 3))))
    assert "0, 1, ... (5 in all)" in table


def test_a_network_without_kernels_has_no_units():
    with pytest.raises(NoUnits, match="it applies no kernel"):
        cbp_jax.discover_units(lambda params, x: x, {}, jnp.ones((2, 3)))
    table = {"embedding": jnp.ones((5, 3)), "out": {"kernel": jnp.ones((3, 2))}}
    adapter = lora.init(table, 0, rank=1, target_modules="embedding")
    with pytest.raises(NoUnits, match="no units can be replaced"):
        cbp_jax.discover_units(
            lambda a, x: lora.apply(table, a)["embedding"][x] @ table["out"]["kernel"], adapter, jnp.arange(3)
        )
