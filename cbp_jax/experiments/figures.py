"""Figures and tables of the papers: the command that reproduces each, its cost, and what was run here."""

import dataclasses

NATURE = "Dohare et al. 2024"
UPGD = "Elsayed & Mahmood 2024"
TICKETS = "Frankle & Carbin 2019"
DOMINANT = "Gong et al. 2022"
STREAMING = "Elsayed et al. 2024"
PQN = "Gallici et al. 2025"
QUESTIONS = "Open questions"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure or table of a paper.

    Attributes:
      paper: its authors and year.
      name: as the paper numbers it.
      about: what it shows.
      command: arguments of `cbp-jax run` that reproduce it at the paper's size.
      cost: cost of that command, from times measured on 2 cores of a CPU.
      here: the size at which it was run for this repository; empty if it was not.
    """

    paper: str
    name: str
    about: str
    command: str
    cost: str
    here: str = ""


FIGURES: tuple[Figure, ...] = (
    Figure(
        NATURE,
        "Fig. 1",
        "Continual ImageNet: backpropagation at three step sizes, L2, shrink and perturb, CBP",
        "continual_imagenet --preset paper",
        "180 lanes of 15M updates; 10 to 14 days a lane",
        "pairs of Quick, Draw!, 200 tasks, ten seeds; the effect shows",
    ),
    Figure(
        NATURE,
        "Fig. 2, Extended Data Fig. 1",
        "class-incremental CIFAR-100 with ResNet-18: accuracy against a retrained network, dormant units, stable rank",
        "class_incremental --preset paper",
        "75 lanes of 1M updates; 40 days a lane",
        "--preset perceptron on Quick, Draw!, five seeds; the effect shows, but not at a smaller step size with L2",
    ),
    Figure(
        NATURE,
        "Fig. 3",
        "slippery ant: standard and tuned Adam, L2, CBP, and ReDo, shrink and perturb, UPGD",
        "slippery_ant --preset paper",
        "800 lanes of 20M steps; 95 minutes a lane, two at once",
        "--preset alternating, 0.9M steps, sixteen seeds: standard and tuned Adam differ, and L2 with and without CBP; "
        "the paper's four learners at its size, one seed",
    ),
    Figure(
        NATURE,
        "Fig. 4, Extended Data Fig. 5",
        "the ant with constant friction",
        "stationary_ant --preset paper",
        "240 lanes of 50M steps; 4 hours a lane, two at once",
        "a million steps of standard Adam",
    ),
    Figure(
        NATURE,
        "Extended Data Fig. 2",
        "slowly-changing regression: six activations, three step sizes, a linear network; also paper_redraw",
        "slowly_changing_regression --preset paper",
        "6,000 lanes of 3M updates; 20 seconds a lane",
        "100 tasks, ten seeds",
    ),
    Figure(
        NATURE,
        "Extended Data Fig. 3b, left, and 3c",
        "Online Permuted MNIST: step sizes, dead units, weight magnitude, effective rank",
        "online_permuted --preset step_size",
        "30 lanes of 48M updates; 2 to 5 days a lane",
        "one step size, width 100 at full length, five seeds; the effects show",
    ),
    Figure(
        NATURE,
        "Extended Data Fig. 3b, center",
        "Online Permuted MNIST: sizes of the network",
        "online_permuted --preset network_size",
        "30 lanes of 48M updates; half an hour a lane at width 100, 17 hours at 1,000, 2 months at 10,000",
        "width 100 at full length, five seeds; the effect shows",
    ),
    Figure(
        NATURE,
        "Extended Data Fig. 3b, right",
        "Online Permuted MNIST: how often the task changes; also task_length_100k and task_length_1m",
        "online_permuted --preset task_length_10k",
        "10 lanes of 48M updates; 2 to 5 days a lane",
    ),
    Figure(
        NATURE,
        "Extended Data Fig. 4",
        "Online Permuted MNIST: Adam, dropout, online normalization, L2, shrink and perturb, CBP",
        "online_permuted --preset paper",
        "600 lanes of 48M updates; 2 to 6 days a lane, with Adam 6 to 17",
        "150 tasks of 4,000 images, width 100; at full length backpropagation, L2 and CBP, width 100",
    ),
    Figure(
        UPGD,
        "Fig. 2",
        "quality of approximate utilities of weights and features",
        "utility_quality --preset paper",
        "90 networks of 2,000 updates, each measured; half an hour in all",
        "with networks of two layers, 20 seeds",
    ),
    Figure(
        UPGD,
        "Fig. 1",
        "Adam with and without restarts, in 1M steps instead of 15M; for EMNIST: label_permuted --preset restarts",
        "input_permuted --preset restarts",
        "200 lanes of 1M updates; 10 minutes a lane",
    ),
    Figure(
        UPGD,
        "input-permuted MNIST, Figs. 3 to 5",
        "accuracy of all learners at their published best, plasticity, weights and gradients",
        "input_permuted --preset best",
        "200 lanes of 1M updates; 10 minutes a lane",
        "80 tasks of 2,500 images, five seeds",
    ),
    Figure(
        UPGD,
        "label-permuted EMNIST, Fig. 6b",
        "the same; --preset paper is the search behind it, as for input-permuted MNIST",
        "label_permuted --preset best",
        "200 lanes of 1M updates; 10 minutes a lane",
        "MNIST, 80 tasks of 2,500 images, five seeds",
    ),
    Figure(
        UPGD,
        "label-permuted CIFAR-10, Fig. 6a",
        "the same with LeNet; for mini-ImageNet, --dataset names a file of its features",
        "label_permuted --preset best --dataset cifar10",
        "200 lanes of 1M updates; an hour a lane",
    ),
    Figure(
        UPGD,
        "Fig. 8",
        "policy collapse: PPO with Adam and UPGD; also with --env halfcheetah, hopper, walker2d or humanoid",
        "policy_collapse --preset paper",
        "90 lanes of 1M steps; 10 minutes a lane",
    ),
    Figure(
        STREAMING,
        "(Stream Q, on a new problem)",
        "Stream Q(lambda) on a changing cart-pole: ObGD, SGD, Adam, and continual backpropagation around each",
        "streaming_control --preset laptop",
        "30 lanes of 400,000 steps; a minute a lane",
    ),
    Figure(
        PQN,
        "(PQN, on a new problem)",
        "PQN on a game of MinAtar whose channels and actions are shuffled periodically",
        "continual_minatar --preset laptop",
        "12 lanes of 4M steps; minutes a lane",
    ),
    Figure(
        TICKETS,
        "Figs. 1, 3 and 4, LeNet",
        "tickets of LeNet-300-100 on MNIST, reinitialized and random ones, by iteration and by density",
        "lottery_tickets --preset paper",
        "285 networks of 50,000 updates; 50 seconds each on a core",
        "this command",
    ),
    Figure(
        TICKETS,
        "Fig. 5, Conv-2",
        "the same for a network with two convolutions on CIFAR-10",
        "convolutional_tickets --preset paper",
        "285 networks of 20,000 updates; half an hour each",
    ),
    Figure(
        DOMINANT,
        "dominant tickets",
        "fine-tuning toward the pre-trained weights, tickets by weights and by dimensions, their overlap between tasks",
        "dominant_tickets --preset paper",
        "hours of an accelerator",
        "five tasks, three layers of a sentence encoder, three seeds; tickets are larger than published",
    ),
    Figure(
        DOMINANT,
        "(the discussion after it)",
        "one low-rank adapter for each task of a stream, with and without L1 on its change",
        "continual_lora --preset paper",
        "hours of an accelerator",
        "five tasks, three layers of a sentence encoder, three orders, three seeds",
    ),
    Figure(
        QUESTIONS,
        "1a",
        "which utility ranks units by their true utility, early and late in tasks, while CBP runs",
        "question_utility_ranking --preset laptop",
        "10 lanes of 180,000 updates; 10 seconds a lane",
        "this command, ten seeds",
    ),
    Figure(
        QUESTIONS,
        "1b",
        "is there a better utility than activation times outgoing weight: CBP with each at its best replacement rate",
        "question_utility --preset laptop",
        "3 minutes of one core a utility, tuning included",
        "this command, ten seeds",
    ),
    Figure(
        QUESTIONS,
        "2",
        "is there a better reinitialization: CBP with each at its best replacement rate",
        "question_reinitialization --preset laptop",
        "4 minutes of one core each, tuning included",
        "this command, ten seeds",
    ),
    Figure(
        QUESTIONS,
        "3",
        "L1 or L2, toward zero or toward the initial weights, each at its best strength",
        "question_penalty --preset laptop",
        "half an hour of one core, tuning included",
        "this command, ten seeds",
    ),
    Figure(
        QUESTIONS,
        "4",
        "whether winning tickets vanish as plasticity is lost, for backpropagation, L2 and CBP",
        "question_tickets --preset laptop",
        "40 lanes of 541,000 updates and 13 searches for tickets; 30 seconds a lane",
        "this command, ten seeds",
    ),
    Figure(
        QUESTIONS,
        "5",
        "ranks of changes and of representations, against forgetting and plasticity, of all learners of a stream",
        "question_rank --preset laptop",
        "140 lanes of 300,000 updates, and 336 to choose settings; an hour of one core",
        "this command, ten seeds",
    ),
    Figure(
        QUESTIONS,
        "6",
        "whether an adapter that is trained on one task after another learns worse than a fresh one",
        "question_adapters --preset laptop",
        "80 lanes of 80,000 updates; 10 seconds a lane",
        "this command, ten seeds",
    ),
)
