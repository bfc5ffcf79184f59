"""Common parts of pictures: markers, intervals, legends, texts and ticks."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from cbp_jax.report import looks, plot_run, plot_tickets, save_figures
from cbp_jax.report.drawing import COLUMN, draw_interval, fill, legend_above, log_ticks, marker, style_of_pictures

PICTURES = {
    "plot_run": lambda out, formats: plot_run(None, out, formats=formats),
    "plot_tickets": lambda out, formats: plot_tickets(None, out, formats=formats),
    "save_figures": lambda out, formats: save_figures({"one": None}, out, formats),
}


@pytest.mark.parametrize("formats", [["xyz"], ("png", "xyz"), ["png", None], "png"], ids=str)
@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_formats_that_matplotlib_does_not_write_are_refused_before_anything_is_drawn(draw, formats, tmp_path):
    message = f"formats must be a list of some of .*eps, .*pdf, .*png, .*svg, .*; got {re.escape(repr(formats))}"
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "pictures", formats)
    assert not (tmp_path / "pictures").exists()


def test_formats_may_be_in_capitals(tmp_path):
    (path,) = save_figures({"one": Figure()}, tmp_path, ["PNG"])
    assert path.name == "one.PNG" and path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def ax():
    with style_of_pictures():
        yield Figure(figsize=(COLUMN, 1.3), layout="constrained").subplots()


def test_a_star_has_no_edge_that_covers_it(ax):
    (star,) = ax.plot([0], [0], color=looks.PINK.color, **marker(looks.PINK, 3))
    assert looks.PINK.marker == "*" and star.get_markeredgewidth() == 0 and star.get_markersize() > 3
    (hollow,) = ax.plot([0], [0], **marker(looks.with_other(looks.PINK), 3))
    assert hollow.get_markerfacecolor() == "white" and same_color(hollow.get_markeredgecolor(), looks.PINK.color)
    (square,) = ax.plot([0], [0], **marker(looks.BLACK, 3))
    assert square.get_markeredgewidth() > 0 and same_color(square.get_markeredgecolor(), "white")


def test_a_marker_is_smaller_than_the_caps_of_its_interval(ax):
    draw_interval(ax, 1.0, 0.5, 2.0, 3.0, looks.BLUE, hollow=True)
    caps, mean = ax.lines
    np.testing.assert_array_equal(caps.get_xydata(), [[0.5, 3], [2, 3]])
    assert caps.get_marker() == "|" and mean.get_markersize() < caps.get_markersize()
    assert mean.get_markerfacecolor() == "white" and mean.get_xydata().tolist() == [[1, 3]]
    draw_interval(ax, 1.0, np.nan, np.nan, 3.0, looks.BLUE)
    assert len(ax.lines) == 3, "one seed has no interval"


def test_names_are_near_markers_that_have_no_line(ax):
    ax.plot([0], [0], "o", label="a")
    legend_above(ax.figure, ax, lines=False)
    legend_above(ax.figure, ax)
    short, long = (legend.handlelength for legend in ax.figure.legends)
    assert short == 1 < long


def test_lines_of_text_have_similar_lengths():
    assert fill("Policy's stable rank (%)", 21) == "Policy's stable\nrank (%)"
    assert fill("Accuracy on the next task (%)", 21) == "Accuracy on the\nnext task (%)"
    assert fill("Dead units (%)", 21) == "Dead units (%)" and fill("", 21) == ""
    assert max(map(len, fill("word " * 16 + "10 seeds", 72).split("\n"))) < 50, "no orphans"
    assert fill("unbreakable", 5) == "unbre\nakabl\ne", "as textwrap does"


@pytest.mark.parametrize("limits", [(2.6, 12), (0.8, 45), (1, 5000)])
def test_numbers_along_a_logarithmic_axis_do_not_overlap(ax, limits):
    ax.set_ylim(*limits)
    log_ticks(ax)
    ax.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels() if label.get_text()]
    boxes = sorted((box.y0, box.y1) for box in boxes if ax.bbox.y0 <= (box.y0 + box.y1) / 2 <= ax.bbox.y1)
    assert len(boxes) >= 3 and all(a[1] < b[0] + 2 for a, b in itertools.pairwise(boxes))
