"""How well do utilities rank units by their true utility, while continual backpropagation runs?

The true utility of a unit is the loss without it (its outgoing weights set to 0) minus the loss. On Online Permuted
images, every utility of `cbp_jax.replacement.UTILITIES`, or of your own, is averaged as continual backpropagation
averages its own, over the last updates before a measurement, and compared with the true utility on examples of the
task: early in every task, after its first `window` updates, and late, after its last. Spearman's rank correlation
measures how well the order of units agrees, and Pearson's correlation how well the values agree, each over the units
of one layer.

Training uses the method's own utility throughout; the others are only computed. Means are reset at the start of
the window, and for units that are replaced in it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from cbp_jax import data, losses, problems, replacement, training
from cbp_jax.experiments import stream
from cbp_jax.experiments.checks import check_counts
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.images import check_classes, gets_vectors
from cbp_jax.experiments.permuted import kaiming
from cbp_jax.experiments.quality import pearson_correlations, rank_correlations, true_feature_utility
from cbp_jax.replacement.views import batch_mean
from cbp_jax.report.drawing import COLUMN, draw_interval, legend_above, save_figures, style_of_pictures, write_note
from cbp_jax.training.learner import begin_task, stream_keys
from cbp_jax.training.step import learn
from cbp_jax.units import UnitGroup, Units

NAME = "question_utility_ranking"
MOMENTS = ("early", "late")
KINDS = {"spearman": rank_correlations, "pearson": pearson_correlations}


@dataclasses.dataclass(frozen=True)
class Settings(stream.ImageStreamSettings):
    """Rankings of units by approximate utilities and by the true one, while continual backpropagation runs."""

    methods: tuple[str, ...] = ("cbp:step_size=0.01",)
    """Learners that train the network: names, optionally with settings."""
    utilities: tuple[str, ...] = tuple(replacement.UTILITIES)
    """Utilities to compare, by name or import path: "my_module:my_utility"; from Python, functions too."""
    window: int = 200
    """Number of updates over which utilities are averaged before a measurement, at most half of a task's."""
    decay_rate: float = 0.99
    """Decay rate of these averages."""


def utilities_of(settings: Settings) -> dict[str, replacement.Utility]:
    """Return the utilities to compare, by the names that they have in results.

    Raises:
      ValueError: there are none, one is unknown, or two have the same name.
    """
    if not settings.utilities:
        raise ValueError("utilities must be at least one, got none")
    found: dict[str, replacement.Utility] = {}
    for utility in settings.utilities:
        function = replacement.get_utility(utility)
        name = utility if utility in replacement.UTILITIES else getattr(function, "__name__", "utility")
        if name in found:
            raise ValueError(f"utilities must have different names, got {name!r} twice")
        found[name] = function
    return found


def measure_name(utility: str, kind: str, moment: str, layer: int) -> str:
    """Return the name of a measure in the results; layers count from 1.

    Example:
      >>> measure_name("taylor", "spearman", "late", 2)
      'taylor_spearman_late_2'
    """
    return f"{utility}_{kind}_{moment}_{layer}"


def _measures(settings: Settings) -> dict[str, str]:
    kinds = {"spearman": "Spearman's rank correlation", "pearson": "Pearson's correlation"}
    return {
        "loss": "mean loss of a task, each example before learning from it",
        "accuracy": "mean accuracy of a task, each example before learning from it",
        "replaced_units": "units replaced in a task",
    } | {
        measure_name(utility, kind, moment, layer + 1): f"{title} of {utility} with the true utility, layer {layer + 1}"
        for utility in utilities_of(settings)
        for kind, title in kinds.items()
        for moment in MOMENTS
        for layer in range(len(settings.hidden))
    }


def check(settings: Settings) -> list[Any]:
    """Check settings before anything is computed; see `stream.check`."""
    check_counts(settings, "window")
    utilities_of(settings)
    if not 0 <= settings.decay_rate < 1:
        raise ValueError(f"decay_rate must be in [0, 1), got {settings.decay_rate}")
    methods = stream.check(settings)
    if not settings.hidden or any(method.hidden not in (None, settings.hidden) for method in methods):
        raise ValueError(f"hidden must be at least one layer and the same for all methods, got {settings.hidden}")
    return methods


def _problem(settings: Settings) -> problems.Problem:
    images = check_classes(data.load(settings.dataset, data_dir=settings.data_dir))
    problem = problems.online_permuted(
        images,
        examples_per_task=settings.examples_per_task,
        batch_size=settings.batch_size,
        flatten=gets_vectors(settings, images),
    )
    if 2 * settings.window > problem.steps_per_task:
        raise ValueError(
            f"window must be at most half of the {problem.steps_per_task} updates of a task, got {settings.window}"
        )
    return problem


def onlooker(
    tx: optax.GradientTransformation, units: Units, decay_rate: float, utilities: Mapping[str, replacement.Utility]
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it averages utilities, without changing its updates.

    Args:
      tx: the optimizer.
      units: the units of the network.
      decay_rate: decay rate of the averages.
      utilities: by name.

    Returns:
      a transformation. The `memory` in its state has for each group `utility`, running means [units] by name, and
      `weight`, [units], the sum of the weights of each mean, which corrects for its start.
    """

    def init(group: UnitGroup, params: optax.Params) -> dict[str, Any]:
        zeros = jnp.zeros(group.size)
        means = tuple(jnp.zeros(consumer.kernel.index.shape) for consumer in group.operands())
        return {"weight": zeros, "utility": dict.fromkeys(utilities, zeros), "mean_activation": means}

    def choose(view: replacement.GroupView, memory: dict[str, Any]) -> replacement.Choice:
        here = view.outgoing_magnitude() > 0  # otherwise it has just been replaced
        mean = lambda old, new: jnp.where(here, decay_rate * old + (1 - decay_rate) * new, 0.0)
        weight = mean(memory["weight"], 1.0)
        means = tuple(
            mean(old, batch_mean(values, old.shape[0]))
            for old, values in zip(memory["mean_activation"], view.features, strict=True)
        )
        corrected = tuple(each / jnp.where(weight > 0, weight, 1.0) for each in means)
        view = dataclasses.replace(view, mean_activation=corrected)
        utility = {
            name: mean(old, utilities[name](view).astype(jnp.float32)) for name, old in memory["utility"].items()
        }
        nobody = jnp.full(1, view.group.size)
        return replacement.Choice(nobody, {"weight": weight, "utility": utility, "mean_activation": means})

    return replacement.replace_units(tx, units, replacement.Policy(choose, init), reset_inner_state=False)


def compare(
    true: Sequence[chex.Array], memory: dict[str, Any], units: Units, utilities: Sequence[str]
) -> dict[str, chex.Array]:
    """Return correlations [utilities, layers] of averaged utilities with the true ones, by kind.

    Args:
      true: the true utilities of each group, [units].
      memory: the `memory` in the state of `onlooker`.
      units: the groups.
      utilities: their names, in the order of the correlations.
    """
    rows = []
    for group, values in zip(units, true, strict=True):
        weight = memory["weight"][group.name]
        found = memory["utility"][group.name]
        found = jnp.stack([values, *(found[name] / jnp.where(weight > 0, weight, 1.0) for name in utilities)])
        rows.append(jnp.where(jnp.isfinite(found), found, 0.0))
    return {kind: jnp.stack([correlate(row) for row in rows], 1) for kind, correlate in KINDS.items()}


def _train(settings: Settings) -> Callable[..., Iterator[dict[str, Any]]]:
    """Return the function that is used instead of `training.run_tasks`."""
    utilities = utilities_of(settings)

    def run_tasks(
        learner, problem, seeds, hyperparameters, tasks, *, mode, measured_examples, checkpoint, lanes_at_once=None, **_
    ):
        go_on = lambda data, state: run_task(
            learner, problem, data, state, settings.window, settings.decay_rate, measured_examples, utilities
        )
        start = lambda seed, values: training.init_state(learner, seed, values)
        return training.run_lanes(
            start,
            go_on,
            problem.data,
            seeds,
            hyperparameters,
            tasks,
            mode=mode,
            checkpoint=checkpoint,
            lanes_at_once=lanes_at_once,
        )

    return run_tasks


def run_task(
    learner: training.Learner,
    problem: problems.Problem,
    data: Any,
    state: training.TrainState,
    window: int,
    decay_rate: float,
    measured_examples: int,
    utilities: Mapping[str, replacement.Utility],
) -> tuple[training.TrainState, dict[str, chex.Array]]:
    """Train a network on a task and compare utilities, one lane; see `training.run_task`."""
    keys = stream_keys(state.key)
    task = problem.make_task(data, keys.problem, state.task)
    x, y = problem.evaluation(data, task, measured_examples)
    tx = optax.with_extra_args_support(learner.optimizer(state.hyperparameters, keys.optimizer))
    watching, task_key = (
        onlooker(tx, learner.units, decay_rate, utilities),
        jax.random.fold_in(keys.dropout, state.task),
    )
    losses_of, _, _ = losses.LOSSES[problem.loss]

    def step(learner, tx, carry, number):
        params, opt_state, totals = carry
        batch, key = problem.batch(data, task, number), jax.random.fold_in(task_key, number)
        params, opt_state, found = learn(learner, tx, problem.loss, params, opt_state, batch, key)
        found["replaced_units"] = replacement.replaced_units(opt_state)
        return params, opt_state, {name: totals[name] + value for name, value in found.items()}

    def until(carry, ends):
        """Train up to the window, then average utilities in it and compare them."""
        first, last = ends
        carry = jax.lax.fori_loop(first, last - window, lambda i, carry: step(learner, tx, carry, i), carry)
        params, opt_state, totals = carry
        watched = params, watching.init(params)._replace(inner_state=opt_state), totals
        curved = learner._replace(curvature=True)
        body = lambda i, carry: step(curved, watching, carry, i)
        params, opt_state, totals = jax.lax.fori_loop(last - window, last, body, watched)
        loss_fn = lambda params: jnp.mean(losses_of(learner.predict(params, x)[0], y))
        true = true_feature_utility(loss_fn, params, learner.units)
        return (params, opt_state.inner_state, totals), compare(true, opt_state.memory, learner.units, tuple(utilities))

    totals = dict.fromkeys(("loss", *losses.LOSSES[problem.loss].metrics, "replaced_units"), jnp.zeros([]))
    ends = jnp.array([[0, window], [window, problem.steps_per_task]])
    (params, opt_state, totals), found = jax.lax.scan(until, (*begin_task(learner, tx, state), totals), ends)
    measures = {
        name: total if name == "replaced_units" else total / problem.steps_per_task for name, total in totals.items()
    }
    measures |= {
        measure_name(utility, kind, moment, layer + 1): values[i, j, layer]
        for kind, values in found.items()
        for i, moment in enumerate(MOMENTS)
        for j, utility in enumerate(utilities)
        for layer in range(len(learner.units))
    }
    return state._replace(params=params, opt_state=opt_state, task=state.task + 1), measures


_LATE = f"_spearman_{MOMENTS[-1]}_"


def _shown(results: Any) -> tuple[list[str], range]:
    """Return the utilities and the layers of results."""
    found = [name.rsplit(_LATE, 1) for name in results.data_vars if _LATE in name]
    return list(dict.fromkeys(utility for utility, _ in found)), range(1, max(int(layer) for _, layer in found) + 1)


def _per_seed(results: Any, method: str, utility: str, kind: str, moment: str, layer: int) -> Any:
    """Return means over finished tasks, [seeds]."""
    values = results[measure_name(utility, kind, moment, layer)].loc[{"method": method}]
    return values.mean("task").dropna("seed").values.astype(float)


def summary(results: Any) -> str:
    """Return the results of a run as a table of text.

    Args:
      results: results of a run, finished or not.

    Returns:
      for each method, kind of correlation and utility, the mean over tasks and then over seeds ± half the 95%
      confidence interval over seeds, by layer, early and late; without a newline at its end.
    """
    from cbp_jax.report.statistics import interval_text

    utilities, layers = _shown(results)
    columns = [(moment, layer) for moment in MOMENTS for layer in layers]
    lines = [f"{NAME}: correlation with the true utility, mean over seeds ± half its 95% confidence interval"]
    width = max(map(len, utilities))
    for method in results.method.values.tolist():
        for kind in KINDS:
            heads = "  ".join(f"{f'{moment}, layer {layer}':>16}" for moment, layer in columns)
            lines += ["", f"{method}, {kind}", f"{'':{width}}  {heads}"]
            for utility in utilities:
                cells = [_per_seed(results, method, utility, kind, *column) for column in columns]
                texts = [interval_text(cell, 3) if len(cell) else "" for cell in cells]
                lines.append(f"{utility:{width}}  " + "  ".join(f"{text:>16}" for text in texts))
    return "\n".join(lines)


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw rank correlations: a row for each utility, a panel each for early and late, and a marker for each layer.

    Bars are 95% bootstrap intervals of the mean over seeds, if there are several. There is a picture for each method.

    Args:
      results: results of a run, finished or not.
      out: folder for the pictures.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      paths of the pictures, for each method one for each format.
    """
    from cbp_jax.report import looks
    from cbp_jax.report.extra import require
    from cbp_jax.report.statistics import bootstrap_interval

    require("matplotlib")
    from matplotlib.figure import Figure

    (utilities, layers), figures = _shown(results), {}
    for number, method in enumerate(results.method.values.tolist()):
        with style_of_pictures():
            figure = Figure(figsize=(COLUMN, 0.2 * len(utilities) + 0.9), layout="constrained")
            axes = figure.subplots(1, len(MOMENTS), sharex=True, sharey=True)
            for ax, moment in zip(axes, MOMENTS, strict=True):
                for layer, style in zip(layers, looks.UNOWNED, strict=False):
                    for row, utility in enumerate(utilities):
                        values = _per_seed(results, method, utility, "spearman", moment, layer)
                        if not len(values):
                            continue
                        place = row + 0.6 * (layer - 0.5) / len(layers) - 0.3
                        low, high = (end[0] for end in bootstrap_interval(values[:, None]))
                        label = f"Layer {layer}" if row == 0 else None
                        draw_interval(ax, values.mean(), low, high, place, style, label=label)
                ax.axvline(0, color="#999999", linewidth=0.6, zorder=0)
                ax.set_title(f"{moment.capitalize()} in a task")
                ax.set_xlabel("Rank correlation")
            axes[0].set_yticks(range(len(utilities)), [looks.readable(utility) for utility in utilities])
            axes[0].invert_yaxis()
            legend_above(figure, axes[0], columns=len(layers), lines=False, markerscale=1.5)
            note = f"{looks.name_of(results, method)}; mean and 95% bootstrap interval of {results.sizes['seed']} seeds"
            write_note(figure, note)
        figures[NAME if results.sizes["method"] == 1 else f"{NAME}_{number + 1}"] = figure
    return save_figures(figures, Path(out), formats)


def _smoke(dataset: str | None) -> Settings:
    sizes = {"tasks": 2, "examples_per_task": 100, "hidden": (6, 5), "measured_examples": 50, "window": 20}
    return Settings(dataset=dataset or "digits", seeds=2, **sizes)


def _laptop(dataset: str | None) -> Settings:
    digits = (dataset or "digits") == "digits"
    return Settings(
        dataset=dataset or "digits",
        methods=(f"cbp:step_size={0.01 if digits else 0.003}",),
        seeds=10,
        first_seed=100,  # the step size was chosen with other seeds
        tasks=100 if digits else 50,
        examples_per_task=None if digits else 4000,
        hidden=(50, 50, 50) if digits else (100, 100, 100),
        measured_examples=1000,
    )


def _paper(dataset: str | None) -> Settings:
    """Return settings with all images of MNIST and the smallest network of Dohare et al. (Nature 2024)."""
    laptop = _laptop(dataset or "mnist")
    return dataclasses.replace(laptop, seeds=30, tasks=100, examples_per_task=None, hidden=(100, 100, 100))


question_utility_ranking = Experiment(
    name=NAME,
    about="Which utility ranks units by their true utility, early and late in tasks, while continual backprop runs.",
    Settings=Settings,
    presets={"smoke": _smoke, "laptop": _laptop, "paper": _paper},
    problem=_problem,
    network=kaiming,
    train=_train,
    measures=_measures,
    check=check,
    plot=plot,
    summary=summary,
)
