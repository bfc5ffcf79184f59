"""Lottery tickets (Frankle & Carbin, ICLR 2019): networks are pruned, rewound to their initial weights, and retrained.

In each round, networks of several kinds are trained (see `ticket_rounds.KINDS`), including the ticket. Then a fraction
of the ticket's living weights of smallest magnitude is pruned, and all networks restart. In results, a round is a task.
Measures are those of the paper: test accuracy after the last iteration and at early stopping, the iteration of minimum
validation loss.

Differences from the paper: each seed has one reinitialized network in each round, while the paper has three for each
ticket; the randomly sparse network keeps its initial weights; batches come in the same order in all rounds of a seed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cbp_jax import data, nets, tickets, training
from cbp_jax.experiments import folder, learners, memory, ticket_rounds
from cbp_jax.experiments.checks import MOST_STEPS, check_counts, check_dataset, check_first_seed, check_hidden, seeds_of
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.images import check_classes, gets_vectors
from cbp_jax.experiments.lanes import Job
from cbp_jax.experiments.progress import Progress, labels_of, tell
from cbp_jax.experiments.ticket_rounds import KINDS
from cbp_jax.numerics.scalars import check_scalar
from cbp_jax.problems.sampling import scaling
from cbp_jax.training.lanes import Lanes
from cbp_jax.units import leaves_by_path

MEASURES = {
    "density": "living weights over prunable weights",
    "test_accuracy": "fraction of test examples classified correctly, after the last iteration",
    "stop_iteration": "iteration of least validation loss",
    "stop_test_accuracy": "fraction of test examples classified correctly, at the iteration of least validation loss",
    "stop_validation_loss": "least mean loss of the validation examples",
    "loss": "mean loss of training",
}
CURVES = {
    "validation_loss_at": "mean loss of the validation examples",
    "test_accuracy_at": "fraction of test examples classified correctly",
}
_CONV_2 = "convnet:channels=(64,64),kernel_sizes=(3,3),padding=SAME,pool_every=2"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Lottery tickets: rounds of training, pruning and rewinding, with controls."""

    methods: tuple[str, ...] = ("ticket", "reinitialized", "random")
    """Networks to train in each round: ticket, late_rewinding, one_shot, reinitialized, random, signs."""
    seeds: int = 5
    """Number of runs, with different seeds."""
    first_seed: int = 0
    """The first seed; the others follow."""
    rounds: int = 18
    """Number of prunings; networks are trained before each, and after the last."""
    fraction: float = 0.2
    """Fraction of the living weights that a round prunes."""
    output_fraction: float = 0.1
    """Fraction that a round prunes in the output layer."""
    conv_fraction: float | None = None
    """Fraction that a round prunes in convolutions, if different."""
    scope: Literal["layer", "global"] = "layer"
    """Whether magnitudes are compared within each layer (layer), or over all layers with the same fraction (global)."""
    iterations: int = 50_000
    """Number of updates in a round."""
    batch_size: int = 60
    """Number of examples in an update."""
    evaluate_every: int = 100
    """Number of iterations between measurements of validation loss and test accuracy."""
    rewind_step: int = 0
    """Iteration to whose weights "late_rewinding" rewinds."""
    learner: str = "adam:step_size=1.2e-3"
    """How networks are trained: a learner's name, optionally with settings: "cbp_adam:replacement_rate=1e-5"; or a
    function: "my_module:my_factory(learning_rate=0.01)"."""
    network: str = "mlp"
    """One of mlp, convnet, lenet, resnet18 and vit, optionally with settings: "vit:depth=2,width=32"; or a Flax module:
    "my_module:MyNet(width=64)". Networks that do not accept images get flattened images."""
    hidden: tuple[int, ...] = (300, 100)
    """Sizes of the hidden layers."""
    activation: str = "relu"
    """Activation of the hidden layers."""
    dataset: str = "digits"
    """A name of `cbp_jax.data.names()` or of tensorflow-datasets, or the path of an array file (.npz)."""
    data_dir: Path | None = None
    """Folder of prepared datasets; by default that of tensorflow-datasets."""
    validation_examples: int = 300
    """Number of training examples to set aside for validation."""
    test_split: str | None = None
    """Split of the dataset for test examples; by default these are set aside from the split "train"."""
    test_examples: int = 300
    """Number of test examples to set aside from the split "train"."""
    lanes: Literal["auto", "vmap", "map"] = "auto"
    """How seeds and networks run on one device: in parallel (vmap) or in turn (map); auto chooses by device."""


def _examples_of(dataset: str) -> dict[str, Any]:
    """Return the settings that determine how examples are split."""
    if dataset == "digits":
        return {"dataset": dataset}
    found = {"dataset": dataset, "validation_examples": 5000}
    return found | ({"test_examples": 10_000} if dataset.endswith((".npz", ".npy")) else {"test_split": "test"})


def _smoke(dataset: str | None, **others: Any) -> Settings:
    return Settings(
        methods=tuple(KINDS),
        seeds=2,
        rounds=2,
        iterations=40,
        evaluate_every=20,
        rewind_step=20,
        **_examples_of(dataset or "digits"),
        **{"hidden": (20, 10), **others},
    )


def _laptop(dataset: str | None, **others: Any) -> Settings:
    dataset = dataset or "digits"
    digits = dataset == "digits"
    return Settings(
        seeds=5 if digits else 3,
        rounds=16 if digits else 12,
        iterations=2000 if digits else 6000,
        evaluate_every=20 if digits else 200,
        **_examples_of(dataset),
        **others,
    )


def _paper(dataset: str | None) -> Settings:
    return Settings(**_examples_of(dataset or "mnist"))


def _conv_laptop(dataset: str | None) -> Settings:
    return dataclasses.replace(
        _laptop(dataset, network=_CONV_2.replace("64", "16"), hidden=(64, 64), conv_fraction=0.1),
        seeds=3,
        rounds=12,
        iterations=1000 if (dataset or "digits") == "digits" else 2000,
        learner="adam:step_size=1e-3",
    )


def _conv_paper(dataset: str | None) -> Settings:
    return dataclasses.replace(
        _paper(dataset or "cifar10"),
        network=_CONV_2,
        hidden=(256, 256),
        conv_fraction=0.1,
        learner="adam:step_size=2e-4",
        iterations=20_000,
    )


def check(settings: Settings) -> list[str]:
    """Check settings before anything is computed.

    Returns:
      the kinds of networks.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    names = ("seeds", "rounds", "iterations", "batch_size", "evaluate_every", "validation_examples", "test_examples")
    check_counts(settings, *names)
    check_first_seed(settings)
    if not settings.methods or len(set(settings.methods)) < len(settings.methods):
        raise ValueError(f"methods must be at least one and all different, got {settings.methods}")
    for kind in settings.methods:
        if kind not in KINDS:
            raise ValueError(f"methods must be of {list(KINDS)}, got {kind!r}")
        if not KINDS[kind].alone and "ticket" not in settings.methods:
            raise ValueError(f"methods must have 'ticket', whose masks {kind!r} takes, got {settings.methods}")
    if settings.iterations % settings.evaluate_every:
        raise ValueError(
            f"evaluate_every must divide iterations = {settings.iterations}, got {settings.evaluate_every}"
        )
    late = "late_rewinding" in settings.methods
    if settings.rewind_step not in range(late, settings.iterations) or settings.rewind_step % settings.evaluate_every:
        raise ValueError(
            f"rewind_step must be a multiple of evaluate_every = {settings.evaluate_every} from "
            f"{settings.evaluate_every if late else 0} to less than iterations, got {settings.rewind_step}"
        )
    for name in ("fraction", "output_fraction", "conv_fraction"):
        value = getattr(settings, name)
        if value is not None:
            check_scalar(name, value, at_least=0, below=1)
    if not settings.fraction > 0:
        raise ValueError(f"fraction must be above 0, got {settings.fraction}")
    if settings.scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {settings.scope!r}")
    if settings.lanes not in ("auto", "vmap", "map"):
        raise ValueError(f"lanes must be 'auto', 'vmap' or 'map', got {settings.lanes!r}")
    if settings.iterations * settings.batch_size > MOST_STEPS:
        raise ValueError(f"iterations times batch_size must be at most {MOST_STEPS}, got more")
    check_dataset(settings.dataset)
    _learning(settings)
    return list(settings.methods)


def _learning(settings: Settings) -> learners.Method:
    """Return the learner, checked together with the network."""
    check_hidden(settings.hidden)
    nets.get_activation(settings.activation)
    (method,) = learners.read_methods([settings.learner], activation=settings.activation)
    if method.curvature or method.reset or method.reference or method.inject_at is not None:
        what = "curvature" if method.curvature else "tasks before which it could be reset"
        what = "reference batches" if method.reference else what
        raise ValueError(f"learner {settings.learner!r}: lottery tickets have no {what}")
    network = nets.read(settings.network)
    for name in method.network:
        if not network.takes(name):
            raise ValueError(f"learner {settings.learner!r}: network {network.name!r} has no {name}")
    return method


def total(settings: Settings) -> int:
    """Return the total number of trainings, for a progress bar.

    Example:
      >>> total(Settings(methods=("ticket", "random"), seeds=5, rounds=3))
      40
    """
    return len(settings.methods) * settings.seeds * (settings.rounds + 1)


def job(experiment: str, settings: Settings) -> Job:
    """Prepare an experiment.

    A round of all seeds and networks is one program. Results and the state are written after each round: a killed run
    keeps its finished rounds, and resumes from there, with the same results.

    Args:
      experiment: its name.
      settings: what to run.

    Returns:
      a function that runs it. Its results have `MEASURES` [method, seed, task] and `CURVES` [method, seed, task,
      evaluation], whose coordinate `iteration` counts updates. Tasks are rounds, the first being that of the dense
      network.

    Raises:
      ValueError: a setting is out of range or unknown, before anything is computed.
      cbp_jax.data.DatasetUnavailable: the dataset is not on this machine.
    """
    kinds, method = check(settings), _learning(settings)
    evaluations = settings.iterations // settings.evaluate_every + 1
    numbers_each = len(MEASURES) + len(CURVES) * evaluations
    memory.check_results(len(kinds), settings.seeds, settings.rounds + 1, numbers_each)
    examples, images, flat = _examples(settings)
    input_shape = (int(np.prod(images.image_shape)),) if flat else images.image_shape
    memory.check_layers((int(np.prod(input_shape)), *settings.hidden, images.num_classes))
    learner = learners.make_learner(
        [method],
        settings.hidden,
        settings.activation,
        input_shape,
        images.num_classes,
        network=settings.network,
        kernel_init=jax.nn.initializers.glorot_normal(),
        bias_init=jax.nn.initializers.zeros,
    )
    memory.check_states(learner, [method] * len(kinds), settings.seeds)
    plan = _plan(settings, learner, method, scaling(images, None), input_shape)

    def run(out: Path, progress: Progress | None = None) -> Any:
        from cbp_jax import report

        out = Path(out)
        empty = _empty_results(experiment, settings, kinds)
        with training.one_blas_thread(), folder.opened(empty, out) as results:
            report.save_results(results, out)
            try:
                _run(results, settings, plan, examples, out, progress)
            finally:
                report.save_results(results, out)
        return results

    return run


def _examples(settings: Settings) -> tuple[ticket_rounds.Data, data.Dataset, bool]:
    """Return the examples on the device, the dataset, and whether images are flattened."""
    load = functools.partial(data.load, settings.dataset, data_dir=settings.data_dir)
    images = check_classes(load())
    test = None if settings.test_split is None else load(settings.test_split)
    flat = gets_vectors(settings, images)
    taken = settings.validation_examples + (0 if test else settings.test_examples)
    if taken + settings.batch_size > len(images):
        raise ValueError(
            f"validation_examples and test_examples leave {max(0, len(images) - taken)} of {len(images)} training "
            f"examples, fewer than batch_size={settings.batch_size}"
        )

    def on_device(dataset: data.Dataset, rows: Any) -> tuple[Any, Any]:
        chosen = dataset.images[rows]
        return jnp.asarray(chosen.reshape(len(chosen), -1) if flat else chosen), jnp.asarray(dataset.labels[rows])

    order = np.random.default_rng(0).permutation(len(images))  # one split for all seeds
    return (
        ticket_rounds.Data(
            train=on_device(images, order[taken:]),
            validation=on_device(images, order[: settings.validation_examples]),
            test=on_device(test, slice(None))
            if test
            else on_device(images, order[settings.validation_examples : taken]),
        ),
        images,
        flat,
    )


def _plan(
    settings: Settings,
    learner: training.Learner,
    method: learners.Method,
    scale: Callable[[Any], Any],
    input_shape: tuple[int, ...],
) -> ticket_rounds.Plan:
    params = jax.eval_shape(learner.init, jax.random.key(0))
    # The kernels found by discovery, which excludes position vectors, class tokens and the like.
    full_mask = functools.partial(tickets.full_mask, select=lambda path, leaf: path in learner.units.kernels)
    output = training.output_layers(learner.units)
    rates = {}
    for path, leaf in leaves_by_path(jax.eval_shape(full_mask, params)).items():
        if len(leaf.shape) < 2:
            continue
        fraction = settings.conv_fraction if len(leaf.shape) == 4 else None
        if any(path == layer or path.startswith(f"{layer}/") for layer in output):
            fraction = settings.output_fraction
        rates[path] = 1.0 if fraction is None else fraction / settings.fraction
    return ticket_rounds.Plan(
        kinds=settings.methods,
        learner=learner,
        numbers=method.hyperparameters,
        prune=functools.partial(tickets.prune, fraction=settings.fraction, scope=settings.scope, rates=rates),
        full_mask=full_mask,
        scale=scale,
        iterations=settings.iterations,
        batch_size=settings.batch_size,
        evaluate_every=settings.evaluate_every,
        rewind_step=settings.rewind_step,
        together=Lanes(settings.seeds, settings.lanes).mode == "vmap",
    )


def _empty_results(experiment: str, settings: Settings, kinds: Sequence[str]) -> Any:
    from cbp_jax import report

    results = report.new_results(
        kinds,
        kinds,
        [{} for _ in kinds],
        seeds=seeds_of(settings),
        tasks=settings.rounds + 1,
        settings=settings,
        experiment=experiment,
        measures=MEASURES,
        looks={kind: KINDS[kind].look for kind in kinds},
    )
    iterations = np.arange(0, settings.iterations + 1, settings.evaluate_every)
    shape = (*results.density.shape, len(iterations))
    dims = (*results.density.dims, "evaluation")
    curves = {
        name: (dims, np.full(shape, np.nan, np.float32), {"long_name": meaning}) for name, meaning in CURVES.items()
    }
    return results.assign(curves).assign_coords(
        evaluation=np.arange(len(iterations)), iteration=("evaluation", iterations)
    )


def _run(
    results: Any,
    settings: Settings,
    plan: ticket_rounds.Plan,
    examples: ticket_rounds.Data,
    out: Path,
    progress: Progress | None,
) -> None:
    """Run the remaining rounds."""
    from cbp_jax import report

    checkpoint = training.Checkpoint(
        out / folder.STATE_FILE,
        "; ".join(plan.kinds),
        every=0.0,  # a round takes long, and its state is small
        before=lambda: report.save_results(results, out),
        needs=lambda tasks: folder.digest(results, plan.kinds, tasks),
    )
    lanes = [(kind, seed) for kind in plan.kinds for seed in seeds_of(settings)]
    complete = bool(results.density.notnull().all()) and not checkpoint.tasks
    if progress is not None and (complete or checkpoint.tasks):
        progress(labels_of(lanes), len(lanes) * (settings.rounds + 1 if complete else checkpoint.tasks), {})
    if complete:
        return
    lap = report.records.stopwatch(results, plan.kinds)
    rounds = training.run_lanes(
        lambda seed, numbers: ticket_rounds.start(plan, seed),
        functools.partial(ticket_rounds.go_on, plan),
        examples,
        np.asarray(seeds_of(settings)),
        {},
        settings.rounds + 1,
        mode=settings.lanes,
        checkpoint=checkpoint,
    )
    for number, measured in enumerate(rounds, start=checkpoint.tasks):
        report.record_task(results, number, {name: measured[name].T for name in MEASURES})
        for name in CURVES:
            results[name].values[:, :, number] = np.swapaxes(measured[name], 0, 1)
        lap()
        diverged = report.mark_diverged(results, number)
        shown = {"accuracy": measured["test_accuracy"].T.ravel(), "density": measured["density"].T.ravel()}
        tell(progress, lanes, number, shown, diverged, ~report.divergence.diverged_by(results, number, lanes))
    checkpoint.delete()


def summary(results: Any) -> str:
    """Return the table of a run; see `report.summarize_tickets`."""
    from cbp_jax import report

    return report.summarize_tickets(results)


def plot(results: Any, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw the pictures of a run; see `report.plot_tickets`."""
    from cbp_jax import report

    return report.plot_tickets(learners.with_looks(results, KINDS), out, formats=formats)


def _experiment(name: str, about: str, **presets: Callable[[str | None], Settings]) -> Experiment:
    return Experiment(
        name=name,
        about=about,
        Settings=Settings,
        presets=presets,
        check=check,
        total=total,
        plot=plot,
        summary=summary,
        job=functools.partial(job, name),
    )


lottery_tickets = _experiment(
    "lottery_tickets",
    "Lottery tickets of LeNet-300-100 (Frankle & Carbin, ICLR 2019): train, prune, rewind, and compare with controls.",
    smoke=_smoke,
    laptop=_laptop,
    paper=_paper,
)
convolutional_tickets = _experiment(
    "convolutional_tickets",
    "Lottery tickets of Conv-2 (Frankle & Carbin, ICLR 2019), whose convolutions are pruned at half the rate.",
    smoke=functools.partial(_smoke, network=_CONV_2.replace("64", "4"), hidden=(10,), conv_fraction=0.1),
    laptop=_conv_laptop,
    paper=_conv_paper,
)
