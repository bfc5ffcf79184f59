"""Streams of permuted images: Online Permuted MNIST, input-permuted MNIST and label-permuted EMNIST or CIFAR-10.

Dohare et al., "Loss of plasticity in deep continual learning", Nature 2024, permute the pixels in every task and show
all images. Elsayed & Mahmood, "Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning", ICLR
2024, do so after fewer examples, or permute the labels of the same images.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cbp_jax import data, nets, problems
from cbp_jax.experiments.experiment import Experiment
from cbp_jax.experiments.images import check_classes, gets_vectors
from cbp_jax.experiments.published import adam_with_restarts, best_methods, paper_grid
from cbp_jax.experiments.stream import ImageStreamSettings


@dataclasses.dataclass(frozen=True)
class Online(ImageStreamSettings):
    """Online Permuted MNIST, or the same with other images: a task is a permutation of the pixels."""


@dataclasses.dataclass(frozen=True)
class Inputs(ImageStreamSettings):
    """Input-permuted MNIST, or the same with other images: a task is a permutation of the pixels."""

    hidden: tuple[int, ...] = (300, 150)
    """Sizes of the hidden layers."""


@dataclasses.dataclass(frozen=True)
class Labels(ImageStreamSettings):
    """Label-permuted EMNIST, CIFAR-10, mini-ImageNet, or other labeled images or features.

    The paper's network for CIFAR-10 is LeNet, without an activation after convolutions in its public code:
    "lenet:conv_activation=identity". "lenet" has ReLU there.
    """

    hidden: tuple[int, ...] = (300, 150)
    """Sizes of the hidden dense layers."""
    examples_per_task: int = 2500
    """Number of examples of each task."""


def _problem(make: Callable[..., problems.Problem], settings: ImageStreamSettings, *, normalize: bool) -> Any:
    """Return a stream of permutation tasks, with the images or features of the settings."""
    images = check_classes(data.load(settings.dataset, data_dir=settings.data_dir))
    return make(
        images,
        examples_per_task=settings.examples_per_task,
        batch_size=settings.batch_size,
        normalize=data.normalization(images) if normalize else None,
        flatten=gets_vectors(settings, images),
    )


def _as_pytorch(settings: ImageStreamSettings) -> dict[str, Any]:
    """Return network options: the paper's network is initialized as in PyTorch; others use their own initializers."""
    papers = nets.read(settings.network).name == "mlp"
    return {"kernel_init": nets.fan_in_uniform(), "bias_init": "fan_in"} if papers else {}


def kaiming(settings: Any) -> dict[str, Any]:
    """Return network options: as in the paper, hidden layers have the gain of their activation, the output layer gain
    1.

    Activations without a known gain get that of ReLU. Networks other than the perceptron use their own initializers.
    """
    if nets.read(settings.network).name != "mlp":
        return {}
    init = lambda activation: nets.kaiming_uniform(activation if activation in nets.GAINS else "relu")
    return {"init_of_activation": init, "output_init": nets.kaiming_uniform("identity")}


def _smoke(settings: type, dataset: str | None, **others: Any) -> Any:
    return settings(
        dataset=dataset or "digits", seeds=2, tasks=4, examples_per_task=200, measured_examples=100, **others
    )


def _online_smoke(dataset: str | None) -> Online:
    return _smoke(Online, dataset, methods=("bp", "cbp"), hidden=(20, 20))


def _online_laptop(dataset: str | None) -> Online:
    # Each learner has the best settings of a small search on one seed.
    if (dataset or "digits") == "digits":
        return Online(
            dataset="digits",
            methods=(
                "bp:step_size=0.01",
                "adam:step_size=3e-4",
                "l2:step_size=0.003,l2=1e-3",
                "l2_init:step_size=0.01,l2=1e-2",
                "shrink_and_perturb:step_size=0.01,l2=1e-2,noise=2e-3",
                "dropout:step_size=0.01",
                "online_norm:step_size=0.01",
                "cbp:step_size=0.01",
            ),
            seeds=5,
            tasks=300,
            hidden=(50, 50, 50),
        )
    return Online(
        dataset=dataset,
        methods=(
            "bp:step_size=0.003",
            "adam:step_size=1e-4",
            "l2:step_size=0.003,l2=3e-3",
            "l2_init:step_size=0.003,l2=1e-2",
            "shrink_and_perturb:step_size=0.003,l2=3e-3,noise=2e-4",
            "dropout:step_size=0.003",
            "online_norm:step_size=0.003",
            "cbp:step_size=0.003",
        ),
        seeds=5,
        tasks=150,
        examples_per_task=4000,
        hidden=(100, 100, 100),
    )


def _online_paper(dataset: str | None) -> Online:
    paper = "step_size=0.003"
    return Online(
        dataset=dataset or "mnist",
        methods=(
            *(f"bp:step_size={step}" for step in (0.01, 0.003, 0.001)),
            *(f"l2:{paper},l2={l2}" for l2 in (1e-3, 1e-4, 1e-5)),
            *(f"shrink_and_perturb:{paper},l2=1e-4,noise={noise}" for noise in (1e-4, 1e-5, 1e-6)),
            *(f"adam:step_size={step}" for step in (1e-4, 5e-5, 3e-5)),
            # Dropout rates are ours: the paper's program has neither dropout nor online normalization.
            *(f"dropout:{paper},dropout_rate={rate}" for rate in (0.01, 0.1, 0.3)),
            f"online_norm:{paper}",
            f"bp:{paper},hidden=none",
            *(f"cbp:{paper},replacement_rate={rate},utility=adaptable_contribution" for rate in (1e-4, 1e-5, 1e-6)),
        ),
        seeds=30,
        tasks=800,
        examples_per_task=60_000,
        hidden=(2000, 2000, 2000),
    )


def _online_figure(methods: tuple[str, ...], examples_per_task: int = 60_000) -> Callable[[str | None], Any]:
    """Return a preset of plain backpropagation on all 48 million examples of the paper's program."""
    return lambda dataset: dataclasses.replace(
        _online_paper(dataset),
        methods=methods,
        seeds=10,
        tasks=48_000_000 // examples_per_task,
        examples_per_task=examples_per_task,
    )


# Robustness of the loss of plasticity: step sizes, sizes of the network, and frequency of task changes.
ONLINE_FIGURES = {
    "step_size": _online_figure(tuple(f"bp:step_size={step}" for step in (0.01, 0.003, 0.001))),
    "network_size": _online_figure(tuple(f"bp:step_size=0.003,hidden={n}x{n}x{n}" for n in (100, 1000, 10_000))),
    **{
        f"task_length_{name}": _online_figure(("bp:step_size=0.003",), examples)
        for name, examples in (("10k", 10_000), ("100k", 100_000), ("1m", 1_000_000))
    },
}


def _of_pytorch_smoke(settings: type) -> Callable[[str | None], Any]:
    return lambda dataset: _smoke(settings, dataset, methods=("bp", "upgd"), hidden=(20, 10), measure_every=5)


def _of_pytorch_laptop(settings: type, methods: tuple[str, ...]) -> Callable[[str | None], Any]:
    def laptop(dataset: str | None) -> Any:
        digits = (dataset or "digits") == "digits"
        return settings(
            dataset=dataset or "digits",
            methods=methods,
            seeds=5,
            tasks=150 if digits else 80,
            examples_per_task=1000 if digits else 2500,
            hidden=(50, 25) if digits else (150, 75),
            measured_examples=1000,
            measure_every=10,
        )

    return laptop


# From a small search on one seed of MNIST, normalized by 0.1307 and 0.3081 at that time.
INPUTS_METHODS = (
    "bp:step_size=0.005",
    "pgd:step_size=0.005,sigma=0.01",
    "shrink_and_perturb:step_size=0.01,l2=1e-2,noise=1e-4",
    "adam:step_size=3e-4",
    "cbp:step_size=0.005",
    "upgd:step_size=0.01,sigma=0.01,weight_decay=1e-2",
)
LABELS_METHODS = (
    "bp:step_size=0.015",
    "pgd:step_size=0.01,sigma=0.03",
    "shrink_and_perturb:step_size=0.01,l2=1e-4,noise=1e-4",
    "adam:step_size=3e-4",
    "cbp:step_size=0.01",
    "upgd:step_size=0.02,sigma=0.01",
)


def _inputs_paper(dataset: str | None, methods: Callable[[str], tuple[str, ...]] = paper_grid) -> Inputs:
    """Return the paper's sizes; the search, or other methods."""
    return Inputs(
        dataset=dataset or "mnist",
        methods=methods("input_permuted_mnist"),
        seeds=20,
        tasks=200,
        examples_per_task=5000,
        measure_every=1,
    )


def _labels_paper(dataset: str | None, methods: Callable[[str], tuple[str, ...]] = paper_grid) -> Labels:
    """Return the paper's sizes; the search of the dataset's problem, or other methods."""
    dataset = dataset or "emnist/balanced"
    problem = _labels_problem(dataset)
    convolutional = problem == "label_permuted_cifar10"
    return Labels(
        dataset=dataset,
        methods=methods(problem),
        seeds=20,
        tasks=400,
        network="lenet:conv_activation=identity" if convolutional else "mlp",
        hidden=(120, 84) if convolutional else (300, 150),
        measure_every=1,
    )


def _labels_problem(dataset: str) -> str:
    """Return the paper's problem for a dataset, or EMNIST's if the dataset is not in the paper."""
    if dataset.split("/")[0].startswith("cifar"):
        return "label_permuted_cifar10"
    name = Path(dataset).stem.lower()
    return "label_permuted_mini_imagenet" if "mini" in name and "imagenet" in name else "label_permuted_emnist"


online_permuted = Experiment(
    name="online_permuted",
    about="Online Permuted MNIST (Dohare et al., Nature 2024): each task has a new permutation of the pixels.",
    Settings=Online,
    presets={"smoke": _online_smoke, "laptop": _online_laptop, "paper": _online_paper, **ONLINE_FIGURES},
    problem=lambda settings: _problem(problems.online_permuted, settings, normalize=False),
    network=kaiming,
)


def _of_pytorch(
    settings: type,
    methods: tuple[str, ...],
    paper: Callable[..., Any],
    make: Callable[..., problems.Problem],
    **what: str,
) -> Experiment:
    """Return an experiment of Elsayed & Mahmood.

    In addition to the usual presets, "best" runs each learner with its published best settings, and "restarts" compares
    Adam with and without a fresh network for every task.
    """
    return Experiment(
        Settings=settings,
        presets={
            "smoke": _of_pytorch_smoke(settings),
            "laptop": _of_pytorch_laptop(settings, methods),
            "paper": paper,
            "best": lambda dataset: paper(dataset, best_methods),
            "restarts": lambda dataset: paper(dataset, adam_with_restarts),
        },
        problem=lambda settings: _problem(make, settings, normalize=True),
        network=_as_pytorch,
        **what,
    )


input_permuted = _of_pytorch(
    Inputs,
    INPUTS_METHODS,
    _inputs_paper,
    problems.online_permuted,
    name="input_permuted",
    about="Input-permuted MNIST (Elsayed & Mahmood, ICLR 2024): every task shuffles the pixels, online, after few "
    "examples.",
)
label_permuted = _of_pytorch(
    Labels,
    LABELS_METHODS,
    _labels_paper,
    problems.label_permuted,
    name="label_permuted",
    about="Label-permuted classification (Elsayed & Mahmood, ICLR 2024): every task renames the classes of the same "
    "images.",
)
