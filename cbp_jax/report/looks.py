"""Appearance of learners in pictures: title, and color, dashes and marker of the line."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

ATTRIBUTE = "looks"  # of results
_NAMES = "names"  # of results: names that an experiment gives to its methods, by label


class Style(NamedTuple):
    """A line style: color, dashes and marker, in Matplotlib's notation."""

    color: str
    dashes: str | tuple
    marker: str
    hollow: bool = False


# Okabe and Ito's palette for color-blind readers, with wine red instead of yellow, which is invisible on white. Some of
# the colors are alike in gray; then only dashes and markers distinguish them.
BLUE = Style("#0072B2", "-", "o")
BLACK = Style("#000000", "-", "s")
VERMILION = Style("#D55E00", (0, (5, 1.5)), "^")
GREEN = Style("#009E73", (0, (6, 1.5, 1, 1.5)), "D")
PURPLE = Style("#CC79A7", (0, (2.5, 1)), "v")
ORANGE = Style("#E69F00", (0, (1, 1)), "P")
SKY = Style("#56B4E9", (0, (6, 1, 1, 1, 1, 1)), "X")
WINE = Style("#882255", (0, (9, 2)), "p")
RUST = Style("#A6341B", "-", ">")
GRAY = Style("#6B6B6B", (0, (4, 1, 1, 1)), "<")
PALETTE = (BLUE, BLACK, VERMILION, GREEN, PURPLE, ORANGE, SKY, WINE, RUST, GRAY)

MUSTARD = Style("#8A6D00", (0, (4, 1.2)), "h")
INDIGO = Style("#332288", (0, (3, 1, 1, 1, 1, 1)), "d")
PINK = Style("#E7298A", (0, (7, 1.5, 3, 1.5)), "*")
PETROL = Style("#11787A", (0, (8, 1.5, 1, 1.5)), "8")
LIME = Style("#7CB518", (0, (1.5, 0.8)), "H")
SALMON = Style("#F4846B", (0, (8, 1.5, 1, 1.5, 1, 1.5)), "s", hollow=True)
SLATE = Style("#5F7F9E", (0, (2, 0.8, 5, 0.8)), "^", hollow=True)
TEAL = Style("#17A2A2", (0, (3, 1.5)), "D", hollow=True)
VIOLET = Style("#9B5DE5", (0, (5, 1, 2, 1)), "v", hollow=True)
BROWN = Style("#7B4B2A", (0, (4, 0.8, 1, 0.8)), "o", hollow=True)
# Learners and variants without a style of their own get these first, since no learner owns them; so does whatever is
# not a learner. Then come the styles of learners that only one experiment has.
UNOWNED = (INDIGO, PINK, LIME, SALMON, SLATE)
SELDOM = (VIOLET, BROWN, TEAL)


def with_other(style: Style, number: int = 0) -> Style:
    """Return the style of a learner's sibling, such as one around Adam: the same color, other dashes, hollow
    markers."""
    return style._replace(dashes=((0, (4, 1.2)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))[number], hollow=True)


# In order; only the last ones are those of learners.
_SPARE = (*UNOWNED, *SELDOM, *(with_other(style) for style in UNOWNED if not style.hollow), *PALETTE)


class Look(NamedTuple):
    """How a learner is named and drawn, in all pictures.

    Attributes:
      title: its name for readers.
      style: its line style; by default one of the palette that no other learner in the picture uses.
      strong: whether its line is drawn thicker, and above the others.
    """

    title: str
    style: Style | None = None
    strong: bool = False


_RESETS = {"network": "fresh each task", "head": "new head each task"}
_ACRONYMS = {"ewc": "EWC", "l1": "L1", "l2": "L2", "mas": "MAS", "snip": "SNIP", "upgd": "UPGD"}
_ACTIVATIONS = {"crelu": "CReLU", "elu": "ELU", "gelu": "GELU", "relu": "ReLU", "selu": "SELU", "silu": "SiLU"}
_SHORT = {"Continual backprop": "CBP"}


def readable(name: str) -> str:
    """Return a title for a name in code.

    >>> readable("layer_norm"), readable("upgd_second_order")
    ('Layer norm', 'UPGD second order')
    """
    words = [_ACRONYMS.get(word, word) for word in name.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def activation_name(name: str) -> str:
    """Return the name of an activation for readers.

    >>> activation_name("leaky_relu"), activation_name("tanh")
    ('leaky ReLU', 'tanh')
    """
    return " ".join(_ACTIVATIONS.get(word, word) for word in name.split("_"))


def to_json(looks: Mapping[str, Look]) -> str:
    """Return the looks of learners as text, to store in results.

    >>> to_json({"cbp": Look("Continual backprop", BLUE)})
    '{"cbp": ["Continual backprop", ["#0072B2", "-", "o", false], false]}'
    """
    return json.dumps(looks)


def looks_of(results: xr.Dataset) -> dict[str, Look]:
    """Return the looks stored in results, by learner; empty if there are none."""
    return {
        name: Look(title, None if style is None else _style(*style), strong)
        for name, (title, style, strong) in json.loads(results.attrs.get(ATTRIBUTE, "{}")).items()
    }


def with_names(results: xr.Dataset, names: Mapping[str, str]) -> xr.Dataset:
    """Return the results with names for readers, by label, which pictures show instead of the usual ones."""
    return results.assign_attrs({_NAMES: json.dumps(names)})


def _style(color: str, dashes: str | list, marker: str, hollow: bool) -> Style:
    if not isinstance(dashes, str):
        offset, lengths = dashes
        dashes = (offset, tuple(lengths))
    return Style(color, dashes, marker, hollow)


def learner_of(results: xr.Dataset, method: str) -> str:
    """Return the name of a method's learner."""
    return str(results.learner.loc[{"method": method}].item())


def look_of(results: xr.Dataset, learner: str) -> Look:
    """Return the look of a learner; by default, with its readable name as title."""
    return looks_of(results).get(learner) or Look(readable(learner))


def name_of(results: xr.Dataset, method: str) -> str:
    """Return a method's label for readers: "Continual backprop (replacement rate 1e-5)"."""
    if method in (given := json.loads(results.attrs.get(_NAMES, "{}"))):
        return given[method]
    learner = learner_of(results, method)
    if not method.startswith(learner):
        return readable(method)
    rest = number_text(method[len(learner) :])
    return f"{look_of(results, learner).title} {rest.replace('_', ' ').replace('=', ' ')}".strip()


def names_of(results: xr.Dataset, methods: Sequence[str]) -> list[str]:
    """Return short labels for readers, all different.

    A learner that occurs once is named by its title. Variants of a learner are named by their kinds, as in
    "Tuned Adam + L2", if that distinguishes them, and otherwise by the settings in which they differ:
    "Continual backprop (replacement rate 1e-5)", and if that is only the step size, by its value: "Backprop, 0.01". A
    method around another one that is named by its kind is named like this too: "Tuned Adam + L2 + CBP". Methods that
    cannot be named in this way keep their labels. Names from :func:`with_names` come before all of these.
    """
    variants: dict[str, list[str]] = {}
    for method in methods:
        variants.setdefault(learner_of(results, method), []).append(method)
    names: dict[str, str] = {}
    for learner, labels in variants.items():
        names |= _names_of_variants(results, learner, labels)
    names |= _names_around(results, variants, names)
    names |= {label: name for label, name in json.loads(results.attrs.get(_NAMES, "{}")).items() if label in names}
    given = list(names.values())
    return [names[method] if given.count(names[method]) == 1 else method for method in methods]


def step_size_note(names: Sequence[str]) -> str:
    """Return the end of a picture's note, which explains names such as "Backprop, 0.01" if there are any."""
    return "; numbers: step sizes" if any(re.search(r", [\d.e-]+$", name) for name in names) else ""


def _names_of_variants(results: xr.Dataset, learner: str, labels: Sequence[str]) -> dict[str, str]:
    title = look_of(results, learner).title
    if len(labels) == 1:
        return {labels[0]: title if labels[0].startswith(learner) else readable(labels[0])}
    if not all(label.startswith(learner) for label in labels):
        return {label: name_of(results, label) for label in labels}
    settings = [_settings(results, label) for label in labels]
    differing = [
        name for name in dict.fromkeys(name for given in settings for name in given)
        if len({given.get(name) for given in settings}) > 1
    ]  # fmt: skip
    kinds = [_kind(title, given, settings) for given in settings]
    if len(set(kinds)) == len(kinds):
        return dict(zip(labels, kinds, strict=True))
    if differing == ["step_size"] and all("step_size" in given for given in settings):
        return {
            label: f"{title}, {number_text(given['step_size'])}" for label, given in zip(labels, settings, strict=True)
        }
    texts = [", ".join(_setting_text(name, given[name]) for name in differing if name in given) for given in settings]
    return {label: f"{title} ({text})" if text else title for label, text in zip(labels, texts, strict=True)}


def _names_around(
    results: xr.Dataset, variants: Mapping[str, Sequence[str]], names: Mapping[str, str]
) -> dict[str, str]:
    """Return names of methods around a learner whose variants are named by kind: "Tuned Adam + L2 + CBP"."""
    found = {}
    by_title = {look_of(results, learner).title: learner for learner in variants}
    for learner, labels in variants.items():
        what, _, title = look_of(results, learner).title.rpartition(", ")
        inside = variants.get(by_title.get(title, ""), ()) if what else ()
        if len(labels) > 1 or len(inside) < 2:
            continue
        settings = [_settings(results, label) for label in inside]
        kinds = [_kind(title, given, settings) for given in settings]
        if kinds == [names[label] for label in inside]:
            found[labels[0]] = f"{_kind(title, _settings(results, labels[0]), settings)} + {_SHORT.get(what, what)}"
    return found


def _kind(title: str, given: Mapping[str, str], among: Sequence[Mapping[str, str]]) -> str:
    """Return what kind of variant this is: "Tuned Adam + L2"."""
    adds = lambda name: name in given and any(name not in other for other in among)
    equal_decays = lambda settings: "b1" in settings and settings["b1"] == settings.get("b2")
    # Equal decay rates of both moments are what Dohare et al. (Nature 2024) call tuned Adam.
    if equal_decays(given) and not all(map(equal_decays, among)):
        title = f"Tuned {title}"
    title += "".join(f" + {readable(name)}" for name in ("l1", "l2") if adds(name))
    return title + (", " + _RESETS.get(given["reset"], f"reset {given['reset']}") if adds("reset") else "")


def label_parts(results: xr.Dataset, method: str) -> list[tuple[str, str, str]]:
    """Return what a method's label says after its learner, as names, "=" and values; "" where there is no "="."""
    inside = method.removeprefix(learner_of(results, method)).removeprefix("(").removesuffix(")")
    return [part.partition("=") for part in re.split(r", (?![^()]*\))", inside) if part]


def _settings(results: xr.Dataset, method: str) -> dict[str, str]:
    """Return the settings in a method's label, and its numbers, also those that the label lacks."""
    found = {name: value for name, equals, value in label_parts(results, method) if equals}
    for name, column in results.coords.items():
        if column.dims == ("method",) and column.dtype.kind == "f":
            value = float(column.loc[{"method": method}])
            if np.isfinite(value):
                found[str(name)] = f"{value:g}"
    return found


def _setting_text(name: str, value: str) -> str:
    if name == "activation":
        return activation_name(value)
    return f"{name.replace('_', ' ')} {number_text(value).replace('_', ' ')}"


def number_text(value: str) -> str:
    """Return a text whose small numbers have short exponents.

    >>> number_text("1e-05"), number_text("0.0001"), number_text("0.01")
    ('1e-5', '1e-4', '0.01')
    """
    value = re.sub(r"\b0\.000([1-9])\b", r"\1e-4", value)
    return re.sub(r"e([+-])0+(\d)", r"e\1\2", value)


def styles_of(results: xr.Dataset, methods: Sequence[str]) -> dict[str, Style]:
    """Return a style for each method: that of its learner; for its second variant paler, with other dashes, and hollow.

    More than two shades of a color are hard to distinguish. Further variants use styles that no learner owns, and then
    those of learners that are not drawn, as long as there are any.
    """
    from matplotlib.colors import to_hex, to_rgb

    learners: dict[str, list[str]] = {}
    for method in methods:
        learners.setdefault(learner_of(results, method), []).append(method)
    base = {learner: style for learner, style in _all_styles(results).items() if learner in learners}
    dashes = list(dict.fromkeys(style.dashes for style in (*PALETTE, *base.values())))
    spare = [style for style in _SPARE if style not in base.values()]
    styles = {}
    for learner, variants in learners.items():
        for i, method in enumerate(variants):
            if i > 1 and spare:
                styles[method] = spare.pop(0)
                continue
            pale = 0.35 if i == 1 else 0.5 * i / len(variants)
            color = to_hex((1 - pale) * np.array(to_rgb(base[learner].color)) + pale)
            first = dashes.index(base[learner].dashes)
            styles[method] = base[learner]._replace(
                color=color,
                dashes=dashes[(first + i) % len(dashes)],
                hollow=base[learner].hollow ^ (i % 2 == 1),
            )
    return styles


def learner_styles(results: xr.Dataset, learners: Sequence[str]) -> dict[str, Style]:
    """Return a style for each learner: its own, which is the same in every picture, or an unused one."""
    own = {learner: look_of(results, learner).style for learner in learners}
    unused = [style for style in (*_SPARE, MUSTARD) if style not in own.values()]
    spare = itertools.cycle([*unused, *(style._replace(hollow=True) for style in PALETTE)])
    return {learner: style or next(spare) for learner, style in own.items()}


def _all_styles(results: xr.Dataset) -> dict[str, Style]:
    """Return the styles of all learners in the results, so that a picture of some of them has the same colors."""
    return learner_styles(results, list(dict.fromkeys(map(str, results.learner.values.tolist()))))


def style_of(results: xr.Dataset, method: str) -> Style:
    """Return the style of a method's learner, as in all pictures of these results."""
    return _all_styles(results)[learner_of(results, method)]
