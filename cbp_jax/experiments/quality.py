"""How well approximate utilities rank weights and features (Elsayed & Mahmood, ICLR 2024, Figure 2).

The utility of a weight is how much the loss of a sample would rise if that weight were 0. That of a feature (a hidden
unit) is the rise if its outgoing weights were 0. UPGD approximates it by the Taylor expansion of the loss,

    first order    -g w
    second order   -g w + h w^2 / 2,    h from HesScale (and, for comparison, exact)

summed over the outgoing weights for a feature, which is the expansion in a gate on its activation. While small
networks learn online, the approximations and three other measures (squared gradient, magnitude, random) are compared
with the true utility by Spearman's rank correlation: over all weights or features of the network (global), and within
each layer, averaged over layers.

As in the authors' setting, inputs are uniform, the target is the sum of two of them, and SGD sees every sample once,
one in each step. The preset "paper" also has their sizes: five inputs, one hidden layer of 50 units, and PyTorch's
initialization of weights and biases. With one hidden layer, a ranking of features within layers equals the global one.
The public code's networks for features have two hidden layers (`--hidden 50 50`).

The public code compares other quantities. Its true utility is the loss after an update, with a weight set to 0, minus
the loss before that update. Its approximations use the weights after the update, and gradient and curvature before it.
It correlates the permutations that sort the utilities, not their ranks. Within layers, it treats kernels and biases
separately, and ignores biases of size one. And the two summed inputs may be the same. Here everything is evaluated at
the same parameters on the same samples, ties share a rank, a layer's kernel and bias are pooled, and the two inputs
differ.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import curvature
from cbp_jax.experiments import folder, memory
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.lanes import Job
from cbp_jax.experiments.progress import Progress, tell
from cbp_jax.nets import MLP, fan_in_uniform, get_activation
from cbp_jax.report.divergence import left_out_note, told, without_diverged
from cbp_jax.report.drawing import COLUMN, few_ticks, marker, save_figures, style_of_pictures, write_note
from cbp_jax.report.statistics import binned, mean_and_error
from cbp_jax.training.lanes import Lanes, one_blas_thread
from cbp_jax.units import Units, discover_units
from cbp_jax.units.groups import leaves_by_path

NAME = "utility_quality"
LEVELS = ("weight", "feature")
SCOPES = ("global", "layer")
UTILITIES = ("second_order_exact", "second_order", "first_order", "squared_gradient", "magnitude", "random")
_SAVE_EVERY = 2.0  # seconds
_CHUNK = 1024  # how many losses with one weight removed are computed at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """Quality of approximate utilities of weights and features."""

    seeds: int = 20
    """Number of runs of each network, seeds 0, 1, ..."""
    steps: int = 2000
    """Number of steps of SGD, each on new samples."""
    measure_every: int = 20
    """Number of steps between measurements. The first is before the first step."""
    activations: tuple[str, ...] = ("tanh", "relu", "leaky_relu")
    """Activations of the hidden layers, a network for each."""
    hidden: tuple[int, ...] = (16, 16)
    """Sizes of the hidden layers."""
    inputs: int = 16
    """Number of inputs, uniform in [-0.5, 0.5]."""
    summed: int = 2
    """Number of inputs whose sum is the target, chosen for each seed."""
    initialization: Literal["kaiming", "pytorch"] = "kaiming"
    """Initialization: Kaiming's with biases of 0 (kaiming), or that of PyTorch's layers, including biases (pytorch)."""
    batch_size: int = 1
    """Number of samples in an update and in a measurement."""
    step_size: float = 0.01
    """Step size of SGD."""
    lanes: Literal["auto", "vmap", "map"] = "vmap"
    """How seeds run on one device: in parallel (vmap) or in turn (map); auto chooses by device."""


def check(settings: Settings) -> list[str]:
    """Check settings before anything is computed.

    Returns:
      the activations, one network each.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    for name in ("seeds", "steps", "measure_every", "inputs", "summed", "batch_size"):
        value = getattr(settings, name)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if settings.measure_every > settings.steps:
        raise ValueError(f"measure_every must be at most steps = {settings.steps}, got {settings.measure_every}")
    if settings.summed > settings.inputs:
        raise ValueError(f"summed must be at most inputs = {settings.inputs}, got {settings.summed}")
    if not settings.step_size >= 0:
        raise ValueError(f"step_size must not be negative, got {settings.step_size}")
    if not settings.hidden or min(settings.hidden) < 1:
        raise ValueError(f"hidden must be sizes of at least one hidden layer, got {settings.hidden}")
    if not settings.activations or len(set(settings.activations)) < len(settings.activations):
        raise ValueError(f"activations must be at least one and all different, got {settings.activations}")
    for activation in settings.activations:
        get_activation(activation)
    if settings.initialization not in ("kaiming", "pytorch"):
        raise ValueError(f"initialization must be 'kaiming' or 'pytorch', got {settings.initialization!r}")
    if settings.lanes not in ("auto", "vmap", "map"):
        raise ValueError(f"lanes must be 'auto', 'vmap' or 'map', got {settings.lanes!r}")
    return list(settings.activations)


def total(settings: Settings) -> int:
    """Return the total number of measurements, for each activation and seed.

    Example:
      >>> total(Settings(seeds=20, steps=2000, measure_every=20, activations=("tanh", "relu")))
      4000
    """
    return len(settings.activations) * settings.seeds * (settings.steps // settings.measure_every)


def job(settings: Settings) -> Job:
    """Prepare the experiment.

    Results are written after each measurement, so a killed run keeps them. A resumed run keeps finished activations and
    restarts the others from their first step, with the same results.

    Args:
      settings: what to run.

    Returns:
      what runs it. Its results are `correlation` [method, level, scope, utility, seed, task] and `loss`
      [method, seed, task], the mean loss of the steps up to the next measurement. Methods are the activations, tasks
      the measurements, whose coordinate `step` counts updates before them. After each, `progress` is called with the
      activation, the number of seeds, and means of what was measured.

    Raises:
      ValueError: a setting is out of range or unknown, before anything is computed.
    """
    from cbp_jax import report

    activations = check(settings)
    measurements = settings.steps // settings.measure_every
    each = 1 + len(LEVELS) * len(SCOPES) * len(UTILITIES)
    memory.check_results(len(activations), settings.seeds, measurements, each)

    def run(out: Path, progress: Progress | None = None) -> Any:
        found = folder.opened(_empty_results(settings, activations), Path(out))
        with one_blas_thread(), found as results:
            report.save_results(results, out)
            try:
                for activation in activations:
                    _run_activation(results, settings, activation, out, progress)
            finally:
                report.save_results(results, out)
        return results

    return run


def _run_activation(
    results: Any,
    settings: Settings,
    activation: str,
    out: Path,
    progress: Progress | None,
) -> None:
    from cbp_jax import report

    if results.correlation.loc[{"method": activation}].notnull().all():
        if progress is not None:
            progress(activation, settings.seeds * results.sizes["task"], {})
        return
    lanes = [(activation, seed) for seed in results.seed.values.tolist()]
    saved, lap = time.monotonic(), report.records.stopwatch(results, [activation])
    for task, (loss, correlation) in enumerate(_measurements(settings, activation)):
        report.record_task(results, task, {"loss": loss[None]}, methods=[activation])
        results.correlation.loc[{"method": activation, "task": task}] = correlation.transpose(1, 2, 3, 0)
        lap()
        diverged = report.mark_diverged(results, task, [activation])
        if time.monotonic() - saved > _SAVE_EVERY:
            report.save_results(results, out)
            saved = time.monotonic()
        shown = {"loss": loss, **dict(zip(UTILITIES, correlation[:, 0, 0].T, strict=True))}
        tell(progress, lanes, task, shown, diverged, ~report.divergence.diverged_by(results, task, lanes))


def _empty_results(settings: Settings, activations: list[str]) -> Any:
    from cbp_jax import report

    tasks = settings.steps // settings.measure_every
    results = report.new_results(
        activations,
        activations,
        [{} for _ in activations],
        seeds=settings.seeds,
        tasks=tasks,
        settings=settings,
        experiment=NAME,
        measures={"loss": "mean loss of the steps up to the next measurement, each before learning from it"},
    )
    shape = (len(activations), len(LEVELS), len(SCOPES), len(UTILITIES), settings.seeds, tasks)
    dims = ("method", "level", "scope", "utility", "seed", "task")
    meaning = {"long_name": "Spearman's rank correlation with the true utility"}
    return results.assign(correlation=(dims, np.full(shape, np.nan, np.float32), meaning)).assign_coords(
        level=list(LEVELS),
        scope=list(SCOPES),
        utility=list(UTILITIES),
        step=("task", settings.measure_every * np.arange(tasks)),
    )


def _measurements(settings: Settings, activation: str) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For each measurement, losses [seeds] and correlations [seeds, levels, scopes, utilities]."""
    start_as = {"kernel_init": fan_in_uniform(), "bias_init": "fan_in"} if settings.initialization == "pytorch" else {}
    net = MLP(settings.hidden, 1, activation, **start_as)
    tx = optax.sgd(settings.step_size)
    example = jnp.zeros((settings.batch_size, settings.inputs))
    units = discover_units(net.apply, jax.eval_shape(net.init, jax.random.key(0), example), example, check=True)

    def sample(key, step):
        chosen = jax.random.permutation(jax.random.fold_in(key, 0), settings.inputs)[: settings.summed]
        x = jax.random.uniform(
            jax.random.fold_in(jax.random.fold_in(key, 1), step), example.shape, minval=-0.5, maxval=0.5
        )
        return x, jnp.sum(x[:, chosen], -1, keepdims=True)

    def start(_, key):
        params = net.init(jax.random.fold_in(key, 2), example)
        return params, tx.init(params)

    def train(params, state, key, step):
        x, y = sample(key, step)
        loss, grads = jax.value_and_grad(lambda p: optax.squared_error(net.apply(p, x), y).sum(-1).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def advance(first, carry, key):
        params, state = carry
        x, y = sample(key, first)
        measured = correlations(net.apply, units, params, x, y, jax.random.fold_in(jax.random.fold_in(key, 3), first))

        def body(carry, step):
            params, state, loss = train(*carry, key, step)
            return (params, state), loss

        carry, losses = jax.lax.scan(body, (params, state), first + jnp.arange(settings.measure_every))
        return carry, jnp.mean(losses), measured

    lanes = Lanes(settings.seeds, settings.lanes)
    keys = lanes.scatter(jax.vmap(jax.random.key)(jnp.arange(settings.seeds)))
    carry = lanes.jit(start)(lanes.share(0), keys)
    advance = lanes.jit(advance)
    for task in range(settings.steps // settings.measure_every):
        chunks = advance(lanes.share(jnp.int32(task * settings.measure_every)), carry, keys)
        carry = tuple(chunk[0] for chunk in chunks)
        yield lanes.gather(tuple(chunk[1:] for chunk in chunks))


def correlations(
    apply_fn: Callable[..., chex.Array], units: Units, params: Any, x: chex.Array, y: chex.Array, key: chex.PRNGKey
) -> chex.Array:
    """Return the rank correlations of approximate utilities with the true ones.

    Args:
      apply_fn: `apply_fn(params, x) -> outputs` [batch, outputs].
      units: the features.
      params: the parameters. Every entry counts as a weight, including biases.
      x: inputs [batch, inputs].
      y: targets [batch, outputs] for squared errors.
      key: for the random utility.

    Returns:
      array [levels, scopes, utilities] in the order of `LEVELS`, `SCOPES` and `UTILITIES`.
    """
    loss_fn = lambda params: optax.squared_error(apply_fn(params, x), y).sum(-1).mean()
    _, grads, approximate = curvature.hesscale(apply_fn, params, x, y, loss="squared_error")
    exact = curvature.hessian_diagonal(loss_fn, params)
    key_weights, key_features = jax.random.split(key)
    weights = [true_weight_utility(loss_fn, params)]
    weights += weight_utilities(params, grads, approximate, exact, key_weights)
    features = [true_feature_utility(loss_fn, params, units)]
    features += feature_utilities(loss_fn, params, units, grads, approximate, key_features)
    return jnp.stack([_scopes(list(map(by_layer, weights))), _scopes(features)])


def _scopes(utilities: list[list[chex.Array]]) -> chex.Array:
    """Return correlations [scopes, utilities] of all utilities with the first. Each utility is a list of values by
    layer."""
    layers = [jnp.stack(values) for values in zip(*utilities, strict=True)]
    per_layer = jnp.stack([rank_correlations(layer) for layer in layers])
    return jnp.stack([rank_correlations(jnp.concatenate(layers, 1)), per_layer.mean(0)])


def rank_correlations(values: chex.Array) -> chex.Array:
    """Return Spearman's rank correlations of each row with the first.

    Args:
      values: matrix [1 + n, entries]. Equal entries of a row share the mean of their ranks.

    Returns:
      array [n]; 0 where a row, or the first, is constant.

    Example:
      >>> values = jnp.array([[1.0, 2.0, 2.0, 9.0], [3.0, 4.0, 4.0, 5.0], [0.0, -1.0, -1.0, -9.0]])
      >>> rank_correlations(values).round(3).tolist()
      [1.0, -1.0]
    """

    def centered_ranks(row):
        # Number of smaller entries minus number of larger ones: twice the centered rank.
        ordered = jnp.sort(row)
        return jnp.searchsorted(ordered, row, side="left") + jnp.searchsorted(ordered, row, side="right") - row.size

    return _with_the_first(jax.vmap(centered_ranks)(values).astype(jnp.float32) / values.shape[1])


def pearson_correlations(values: chex.Array) -> chex.Array:
    """Return Pearson's correlations of each row with the first.

    Args:
      values: matrix [1 + n, entries].

    Returns:
      array [n]; 0 where a row, or the first, is constant.

    Example:
      >>> values = jnp.array([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [5.0, 5.0, 5.0], [2e-9, 1e-9, 0.0]])
      >>> pearson_correlations(values).round(3).tolist()
      [1.0, 0.0, -1.0]
    """
    largest = jnp.max(jnp.abs(values), 1, keepdims=True)
    scaled = values / jnp.where(largest > 0, largest, 1.0)  # so that squares of small utilities do not underflow
    return _with_the_first(jnp.where(jnp.ptp(scaled, 1, keepdims=True) > 0, scaled - scaled.mean(1, keepdims=True), 0))


def _with_the_first(rows: chex.Array) -> chex.Array:
    """Return cosines of the angles of all other rows with the first; 0 where one is 0."""
    norms = jnp.sqrt(jnp.sum(rows**2, 1))
    scale = norms[0] * norms[1:]
    return jnp.where(scale > 0, jnp.sum(rows[1:] * rows[0], 1) / jnp.where(scale > 0, scale, 1), 0.0)


def by_layer(tree: Any) -> list[chex.Array]:
    """Return the entries of params by layer, with kernel and bias pooled."""
    layers: dict[str, list[chex.Array]] = {}
    for path, leaf in leaves_by_path(tree).items():
        layers.setdefault(path.rpartition("/")[0], []).append(jnp.ravel(leaf))
    return [jnp.concatenate(leaves) for leaves in layers.values()]


def true_weight_utility(loss_fn: Callable[[Any], chex.Array], params: Any) -> Any:
    """Return how much the loss rises if an entry of the params is set to 0, for every entry: a pytree like params."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    chunk = min(_CHUNK, flat.size + 1)
    rows = jnp.arange(-(-(flat.size + 1) // chunk) * chunk)
    # The rows from `flat.size` on remove nothing. Their loss comes from the same program as the others, so that weights
    # whose utility is exactly 0 are not distinguished by rounding.
    losses = jax.lax.map(
        lambda row: loss_fn(unravel(jnp.where(jnp.arange(flat.size) == row, 0, flat))), rows, batch_size=chunk
    )
    return unravel(losses[: flat.size] - losses[flat.size])


def weight_utilities(params: Any, grads: Any, approximate: Any, exact: Any, key: chex.PRNGKey) -> list[Any]:
    """Return approximate utilities of the weights, pytrees like params in the order of `UTILITIES`."""
    first = jax.tree.map(lambda w, g: -g * w, params, grads)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noise = treedef.unflatten([jax.random.uniform(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    second = lambda diagonal: jax.tree.map(lambda f, w, h: f + 0.5 * h * w**2, first, params, diagonal)
    squares, magnitudes = jax.tree.map(jnp.square, grads), jax.tree.map(jnp.abs, params)
    return [second(exact), second(approximate), first, squares, magnitudes, noise]


def true_feature_utility(loss_fn: Callable[[Any], chex.Array], params: Any, units: Units) -> list[chex.Array]:
    """Return how much the loss rises if a unit's outgoing weights are set to 0: an array [units] for each group."""
    utilities = []
    for group in units:
        # The last row removes nothing, for the same reason as in `true_weight_utility`.
        masks = jnp.eye(group.size + 1, group.size, dtype=bool)
        losses = jax.vmap(lambda units, group=group: loss_fn(_scale_outgoing(params, group, units, 0.0)))(masks)
        utilities.append(losses[:-1] - losses[-1])
    return utilities


def feature_utilities(
    loss_fn: Callable[[Any], chex.Array], params: Any, units: Units, grads: Any, approximate: Any, key: chex.PRNGKey
) -> list[list[chex.Array]]:
    """Return approximate utilities of the features, in the order of `UTILITIES`: an array [units] for each group.

    For a gate on a feature's activation, the gradient is the sum of w g over the outgoing weights, and HesScale's
    curvature is the sum of w^2 h.
    """
    rows: list[list[chex.Array]] = [[] for _ in UTILITIES]
    w, g, h = leaves_by_path(params), leaves_by_path(grads), leaves_by_path(approximate)
    for number, group in enumerate(units):
        total = lambda f, group=group: sum(
            c.kernel.sum(f(w[c.kernel.path], g[c.kernel.path], h[c.kernel.path])).sum(0) for c in group.outgoing
        )
        slope = total(lambda w, g, h: w * g)

        def bend(unit, group=group):
            loss_of_gate = lambda gate: loss_fn(_scale_outgoing(params, group, unit, gate))
            return jax.grad(jax.grad(loss_of_gate))(1.0)

        exact = jax.vmap(bend)(jnp.eye(group.size, dtype=bool))
        noise = jax.random.uniform(jax.random.fold_in(key, number), (group.size,))
        values = (
            -slope + 0.5 * exact,
            -slope + 0.5 * total(lambda w, g, h: w**2 * h),
            -slope,
            slope**2,
            total(lambda w, g, h: jnp.abs(w)),
            noise,
        )
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    return rows


def _scale_outgoing(params: Any, group: Any, units: chex.Array, factor: chex.Array | float) -> Any:
    """Return the params with the outgoing weights of masked units scaled."""
    leaves = leaves_by_path(params)
    for consumer in group.outgoing:
        leaf = leaves[consumer.kernel.path]
        leaves[consumer.kernel.path] = jnp.where(consumer.kernel.mask(units, leaf), factor * leaf, leaf)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


_ROWS = {"weight": "Weights", "feature": "Units"}
_LABELS = {
    "second_order_exact": "Second order, exact curvature",
    "second_order": "Second order, HesScale",
    "first_order": "First order",
    "squared_gradient": "Squared gradient",
    "magnitude": "Weight magnitude",
    "random": "Random",
}


def summary(results: Any) -> str:
    """Return the results of a run as a text table.

    Args:
      results: results of a run, finished or not.

    Returns:
      for each activation and utility, the mean over measurements and then over seeds of the correlation with the true
      utility, ± one standard error over seeds; without a newline at its end. Seeds with which some network diverged are
      left out, and listed below.
    """
    notes, results = told(results, paired=True), without_diverged(results)
    columns = [(level, scope) for level in LEVELS for scope in SCOPES]
    heads = [f"{level}s, {'global' if scope == 'global' else 'by layer'}" for level, scope in columns]
    lines = [f"{NAME}: Spearman's rank correlation with the true utility, mean over seeds ± standard error"]
    width = max(map(len, _LABELS.values()))
    for activation in results.method.values.tolist():
        lines += ["", f"{activation:{width}}  " + "  ".join(f"{head:>18}" for head in heads)]
        lines.append("-" * len(lines[-1]))
        for utility in UTILITIES:
            cells = []
            for level, scope in columns:
                where = {"method": activation, "level": level, "scope": scope, "utility": utility}
                values = results.correlation.loc[where].transpose("seed", "task").values
                mean, error = mean_and_error(mean_and_error(values, axis=1)[0])
                cells.append(f"{mean:.3f} ± {error:.3f}" if np.isfinite(error) else f"{mean:.3f}")
            lines.append(f"{_LABELS[utility]:{width}}  " + "  ".join(f"{cell:>18}" for cell in cells))
    return "\n".join([*lines, *([""] if notes else []), *notes])


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Plot the global correlations over time: a column for each activation, weights above units.

    There is one line for each utility: the mean over seeds, with a band of one standard error to either side. Seeds
    with which some network diverged are left out.

    Args:
      results: results of a run, finished or not.
      out: folder for the picture.
      formats: kinds of file to write, as Matplotlib names them.

    Returns:
      paths of the picture, one for each format.
    """
    from cbp_jax.report import looks
    from cbp_jax.report.extra import require

    require("matplotlib")
    from matplotlib.figure import Figure

    results, left_out = without_diverged(results), left_out_note(results)
    styles = dict(zip(UTILITIES, (*looks.UNOWNED, *looks.SELDOM), strict=False))
    activations = results.method.values.tolist()
    bin_size = max(1, results.sizes["task"] // 25)
    every = int(results.step.values[1] - results.step.values[0]) if results.sizes["task"] > 1 else 1
    with style_of_pictures():
        figure = Figure(figsize=(COLUMN * max(1, len(activations) / 3), 3.2), layout="constrained")
        axes = figure.subplots(len(LEVELS), len(activations), sharex=True, sharey=True, squeeze=False)
        for i, level in enumerate(LEVELS):
            for j, activation in enumerate(activations):
                ax = axes[i, j]
                for utility in reversed(UTILITIES):
                    where = {"method": activation, "level": level, "scope": "global", "utility": utility}
                    values = results.correlation.loc[where].transpose("seed", "task").values
                    task, mean, low, high = binned(values.astype(np.float64), bin_size)
                    step, style = every * (task - 1), styles[utility]
                    ax.fill_between(step, low, high, color=style.color, alpha=0.2, linewidth=0)
                    ax.plot(
                        step,
                        mean,
                        color=style.color,
                        linestyle=style.dashes,
                        linewidth=1,
                        **marker(style, 2.8),
                        markevery=(UTILITIES.index(utility) % 5, 5),  # staggered, so that overlapping lines are visible
                        label=_LABELS[utility],
                    )
                ax.set_title(looks.activation_name(activation) if i == 0 else "")
                ax.set_ylabel(_ROWS[level] if j == 0 else "")
                few_ticks(ax)
                ax.set_xlabel("Step" if i == len(LEVELS) - 1 else "")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=2)
        figure.supylabel("Rank correlation", fontsize=7)
        note = f"Global correlations; mean and one standard error of {results.sizes['seed']} seeds"
        note += f"; bins of {bin_size * every} steps" if bin_size > 1 else ""
        write_note(figure, note + left_out)
    return save_figures({NAME: figure}, Path(out), formats)


utility_quality = Experiment(
    name=NAME,
    about="How well approximate utilities rank weights and features (Elsayed & Mahmood, ICLR 2024, Figure 2).",
    Settings=Settings,
    presets={
        "smoke": lambda: Settings(seeds=2, steps=40, measure_every=10, activations=("tanh",), hidden=(6, 5), inputs=8),
        "laptop": Settings,
        "paper": lambda: Settings(seeds=30, measure_every=1, hidden=(50,), inputs=5, initialization="pytorch"),
    },
    check=check,
    total=total,
    plot=plot,
    summary=summary,
    job=job,
)
