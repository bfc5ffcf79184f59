"""The picture of a network's groups: positions of bars and arrows."""

import jax.numpy as jnp
import pytest

import cbp_jax
from cbp_jax.report import plot_units
from cbp_jax.report.drawing import COLUMN


@pytest.fixture(scope="module")
def units():
    """Return a network of two blocks around a residual stream, which four kernels write. Names do not reveal the
    order."""
    params = {
        "z_stem": jnp.ones((3, 4)), "y_in": jnp.ones((4, 5)), "x_out": jnp.ones((5, 4)), "b_in": jnp.ones((4, 6)),
        "a_out": jnp.ones((6, 4)), "c_last": jnp.ones((4, 7)), "head": jnp.ones((7, 2)),
    }  # fmt: skip

    def apply_fn(params, x):
        x = x @ params["z_stem"]
        x = x + jnp.tanh(x @ params["y_in"]) @ params["x_out"]
        x = x + jnp.tanh(x @ params["b_in"]) @ params["a_out"]
        return jnp.tanh(x @ params["c_last"]) @ params["head"]

    return cbp_jax.discover_units(apply_fn, params, jnp.ones((1, 3)))


def texts(labels):
    return [label.get_text() for label in labels]


def bars(figure):
    """Return lane, first row and last row, by group."""
    boxes = {patch.get_gid(): patch for patch in figure.axes[0].patches}
    return {
        name: (box.get_x() + box.get_width() / 2, box.get_y() + 0.3, box.get_y() + box.get_height() - 0.3)
        for name, box in boxes.items()
    }


def arrows(figure):
    """Return row, start and end of each arrow."""
    return sorted((text.xy[1], text.xyann[0], text.xy[0]) for text in figure.axes[0].texts)


def test_a_group_spans_from_its_first_kernel_to_its_last(units):
    figure = plot_units(units)
    assert texts(figure.axes[0].get_yticklabels()) == ["z_stem", "y_in", "x_out", "b_in", "a_out", "c_last", "head"]
    expected = {"z_stem": (0, 0, 5), "y_in": (1, 1, 2), "b_in": (1, 3, 4), "c_last": (1, 5, 6)}
    assert bars(figure) == {name: pytest.approx(place) for name, place in expected.items()}
    colors = {patch.get_gid(): patch.get_facecolor() for patch in figure.axes[0].patches}
    assert colors["y_in"] == colors["b_in"] != colors["z_stem"]
    assert texts(figure.legends[0].get_texts()) == ["residual", "dense"]
    (beside,) = figure.axes[0].child_axes
    notes = ["4 residual", "5 dense", "6 dense", "7 dense", "2, left out"]  # names are those of the rows
    assert texts(beside.get_yticklabels()) == notes and beside.get_yticks().tolist() == [0, 1, 3, 5, 6]


def test_each_kernel_is_an_arrow_from_what_it_reads_to_what_it_writes(units):
    found = arrows(plot_units(units))
    # From the left edge into the stream, twice out of it and back, and then to the right edge.
    sides = [(-1, 0), (0, 1), (1, 0), (0, 1), (1, 0), (0, 1), (1, 2)]
    assert [(start, round(end)) for _, start, end in found] == sides
    assert [row for row, _, _ in found] == list(range(7))
    # Arrowheads end at the near side of a bar.
    assert [end - round(end) for _, _, end in found] == pytest.approx([-0.15, -0.15, 0.15, -0.15, 0.15, -0.15, -0.15])


def test_kernels_that_touch_no_selected_group_are_not_drawn(units):
    figure = plot_units(units.select("y_in", "b_in"))
    assert texts(figure.axes[0].get_yticklabels()) == ["y_in", "x_out", "b_in", "a_out"]
    assert figure.get_figwidth() == COLUMN
    assert {name: lane for name, (lane, _, _) in bars(figure).items()} == {"y_in": 0, "b_in": 0}
    assert [(start, round(end)) for _, start, end in arrows(figure)] == [(-1, 0), (0, 1)] * 2


def test_groups_written_by_hand_are_drawn_one_after_the_other(units):
    by_hand = tuple(units)[1:3]
    assert texts(plot_units(by_hand).axes[0].get_yticklabels()) == ["y_in", "x_out", "b_in", "a_out"]


def test_one_kernel_may_write_and_read_several_groups():
    params = {"both": jnp.ones((3, 4)), "first": jnp.ones((2, 2)), "second": jnp.ones((4, 2))}

    def apply_fn(params, x):
        h = x @ params["both"]
        return jnp.tanh(h[:, :2]) @ params["first"] + jnp.tanh(h) @ params["second"]

    figure = plot_units(cbp_jax.discover_units(apply_fn, params, jnp.ones((1, 3))))
    assert set(bars(figure)) == {"both", "both#2"}
    (beside,) = figure.axes[0].child_axes
    # A group has a name of its own if it is not the row's.
    assert "both#2: " in beside.get_yticklabels()[0].get_text()
    assert len({lane for lane, _, _ in bars(figure).values()}) == 2
    assert [(row, start) for row, start, _ in arrows(figure)] == [(0, -1), (0, -1), (1, 0), (2, 0), (2, 1)]


def test_a_picture_is_written(units, tmp_path):
    plot_units(units, tmp_path / "units.png")
    assert (tmp_path / "units.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="units is empty"):
        plot_units(())
