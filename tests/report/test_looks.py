"""Names and styles of methods in pictures."""

import pytest

from cbp_jax.experiments.learners import LEARNERS, looks_by_learner, with_looks
from cbp_jax.experiments.questions.adapter_learners import LEARNERS as ADAPTERS
from cbp_jax.experiments.streaming_learners import LEARNERS as STREAMING
from cbp_jax.report import looks, new_results, plot_tasks, record_task

ADAM = "step_size=0.001"
TUNED = f"{ADAM}, b1=0.99, b2=0.99"


def results_of(methods):
    """Make results of methods by label, each 50% accurate."""
    learners = [method.partition("(")[0] for method in methods]
    results = new_results(
        methods, learners, [{}] * len(methods), seeds=1, tasks=1, settings={}, experiment="x",
        looks=looks_by_learner(learners),
    )  # fmt: skip
    for name in ("accuracy", "dead_units", "weight_magnitude", "effective_rank"):
        record_task(results, 0, {name: [[0.5]] * len(methods)})
    return results


def names_of(*methods):
    return looks.names_of(results_of(methods), methods)


def test_a_method_around_adam_is_named_like_its_variants():
    around = f"cbp_adam({TUNED}, l2=0.0001, replacement_rate=0.0003, maturity_threshold=1000)"
    adams = [f"adam({ADAM})", f"adam({TUNED})", f"adam({TUNED}, l2=0.0001)"]
    names = ["Adam", "Tuned Adam", "Tuned Adam + L2", "Tuned Adam + L2 + CBP"]
    assert list(names_of(*adams, around)) == names
    assert names_of(adams[0], around) == ["Adam", "Continual backprop, Adam"]
    assert names_of("adam(step_size=0.1)", "adam(step_size=0.2)", around)[-1] == "Continual backprop, Adam"
    assert names_of(*adams, f"redo_adam({ADAM})")[-1] == "Adam + ReDo"


def test_the_step_size_alone_is_a_number_that_the_note_explains():
    labels = ["bp(step_size=0.003)", "bp(step_size=1e-05)"]
    assert names_of(*labels) == ["Backprop, 0.003", "Backprop, 1e-5"]
    notes = [text.get_text() for text in plot_tasks(results_of(labels)).texts]
    assert any("numbers: step sizes" in note for note in notes)
    assert not any("numbers" in text.get_text() for text in plot_tasks(results_of(["bp", "cbp"])).texts)


def test_an_experiment_names_its_methods():
    results = looks.with_names(results_of(["bp", "cbp"]), {"bp": "Plain", "other": "Other"})
    assert looks.names_of(results, ["bp", "cbp"]) == ["Plain", "Continual backprop"]
    assert looks.name_of(results, "bp") == "Plain"


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_second_variant_is_hollow_and_further_ones_have_colors_that_no_learner_has(count):
    labels = [f"bp(step_size={number})" for number in range(count)]
    styles = list(looks.styles_of(results_of([*labels, "cbp"]), [*labels, "cbp"]).values())
    own = lambda style: (style.color.upper(), *style[1:])
    assert own(styles[0]) == looks.BLACK and own(styles[-1]) == looks.BLUE
    assert styles[1].hollow and styles[1].marker == looks.BLACK.marker and styles[1].color != looks.BLACK.color
    assert set(styles[2:-1]) <= set(looks.UNOWNED) and len(set(styles)) == count + 1


def test_no_learner_owns_the_colors_of_what_is_not_a_learner():
    owned = [learner.look.style for learner in LEARNERS.values() if learner.look.style]
    assert not {style.color for style in owned} & {style.color for style in (*looks.UNOWNED, *looks.SELDOM)}
    strangers = [f"stranger_{number}" for number in range(11)]
    styles = looks.learner_styles(results_of(strangers), strangers).values()
    assert not {style.color for style in owned} & {style.color for style in styles} and len(set(styles)) == 11
    # Learners of one experiment look like no other learner, except that continual backpropagation is blue.
    for learners in (ADAPTERS, {name: each for name, each in STREAMING.items() if name not in LEARNERS}):
        colors = {each.look.style.color for each in learners.values() if each.look.style}
        assert colors <= {style.color for style in looks.SELDOM} | {looks.BLUE.color}


def test_looks_saved_in_results_give_way_to_todays():
    results = results_of(["bp"]).assign_attrs(looks=looks.to_json({"bp": looks.Look("Old", looks.PINK)}))
    assert looks.looks_of(with_looks(results))["bp"] == LEARNERS["bp"].look
    assert looks.looks_of(with_looks(results, {}))["bp"].title == "Old"
    given = with_looks(results, {"bp": ADAPTERS["full"]})
    assert looks.looks_of(given)["bp"].title == "All weights"
