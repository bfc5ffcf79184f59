"""Common parts of experiments on texts: settings, encoder, tasks as tokens, batches, loss and accuracy."""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import data, nets
from cbp_jax.experiments.checks import check_counts, check_first_seed, seeds_of

FROM_NOTHING = "none"
_TEST_SPLITS = ("test", "validation", "validation_matched")
_NEVER = -1e9  # the logit of a class that is not an option
# Random streams of a seed.
_INIT, _DROPOUT, _BATCHES = range(3)


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Settings of every experiment on texts."""

    tasks: tuple[str, ...] = data.text.EMBEDDED
    """Datasets, one for each task: "docstrings/library", "docstrings/kind", the path of a .jsonl or .csv file (.gz), or
    a name of tensorflow-datasets such as "glue/sst2"."""
    seeds: int = 3
    """Number of runs with different seeds, which determine training texts, their order, heads and dropout."""
    first_seed: int = 0
    """The first seed; the others follow."""
    encoder: str = "auto"
    """A folder with config.json, model.safetensors and tokenizer.json of BERT or RoBERTa; "none" for a small encoder
    trained from scratch; "auto" for the package of [text] if it is installed, otherwise "none"."""
    depth: int | None = None
    """Number of the encoder's layers to use, from the first on; by default all of a pre-trained encoder, two of a small
    one."""
    width: int = 32
    """Width of a small encoder."""
    vocabulary: int = 2000
    """Vocabulary size of a small encoder: the most frequent words of all tasks' training texts."""
    length: int = 64
    """Maximum number of tokens of a text; longer texts are truncated."""
    train_texts: int = 2000
    """Maximum number of training texts of a task."""
    test_texts: int = 500
    """Maximum number of test texts of a task."""
    batch_size: int = 16
    """Number of texts in an update."""
    steps: int = 375
    """Number of updates of a task."""
    warmup: float = 0.1
    """Fraction of the updates in which the learning rate rises linearly; afterwards it falls linearly to 0."""
    dropout_rate: float = 0.1
    """Dropout rate in the encoder."""
    data_dir: Path | None = None
    """Folder of prepared datasets; by default that of tensorflow-datasets."""
    lanes: Literal["auto", "vmap", "map"] = "auto"
    """How seeds run on one device: in parallel (vmap) or in turn (map); auto chooses by device."""


class Task(NamedTuple):
    """A task: texts, with labels numbered over all tasks."""

    name: str
    classes: range
    train: Mapping[int, data.TokenDataset]  # by seed
    test: data.TokenDataset


class Prepared(NamedTuple):
    """The encoder and the tasks."""

    encoder: nets.Bert
    params: Any  # parameters of a pre-trained encoder, or None
    name: str  # name of the encoder
    tasks: tuple[Task, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes of all tasks together."""
        return self.tasks[-1].classes.stop

    @property
    def net(self) -> nets.TextClassifier:
        """The encoder with one head over the classes of all tasks."""
        return nets.TextClassifier(self.num_classes, self.encoder)

    def class_masks(self) -> np.ndarray:
        """For each task, which classes are its own, bool [tasks, classes]."""
        numbers = np.arange(self.num_classes)
        return np.stack([(numbers >= task.classes.start) & (numbers < task.classes.stop) for task in self.tasks])

    def init(self, params: Any, seed: chex.Array) -> dict[str, Any]:
        """Return the parameters of the network for a seed: "encoder" from `params` or newly initialized, and a "head"
        of zeros."""
        if self.params is None:
            tokens = jnp.zeros((1, 2), jnp.int32)
            params = self.encoder.init(key_of(seed, _INIT), tokens)["params"]
        shape = self.encoder.width, self.num_classes
        return {"encoder": params, "head": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}}


class Batch(NamedTuple):
    """Texts of a step, or of many, [steps, ...]."""

    tokens: chex.Array  # int32 [batch, length]
    lengths: chex.Array  # int32 [batch]
    types: chex.Array  # int32 [batch, length]
    labels: chex.Array  # int32 [batch], over the classes of all tasks
    classes: chex.Array  # bool [batch, classes], which classes are options

    @property
    def mask(self) -> chex.Array:
        """Which tokens are not padding."""
        return jnp.arange(self.tokens.shape[-1]) < self.lengths[..., None]


def check(settings: TextSettings) -> None:
    """Check settings before anything is loaded.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    counts = ("seeds", "width", "train_texts", "test_texts", "batch_size", "steps", "depth")
    check_counts(settings, *counts)
    check_first_seed(settings)
    if not settings.tasks or len(set(settings.tasks)) < len(settings.tasks):
        raise ValueError(f"tasks must be at least one and all different, got {settings.tasks}")
    for name, least in (("length", 4), ("vocabulary", 5)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(settings, name)}")
    for name in ("warmup", "dropout_rate"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(settings, name)}")
    if settings.lanes not in ("auto", "vmap", "map"):
        raise ValueError(f"lanes must be 'auto', 'vmap' or 'map', got {settings.lanes!r}")


def check_numbers(settings: Any, **numbers: float | Sequence[float]) -> None:
    """Raise a ValueError if one of these settings is not a finite number of at least 0."""
    for name, values in numbers.items():
        for value in values if isinstance(values, tuple) else (values,):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")


def prepare(settings: TextSettings) -> Prepared:
    """Load the encoder and the tasks.

    Raises:
      ValueError: a dataset has no training or no test texts, or one class; or the encoder cannot be read, does not fit
        its tokenizer, or has too few positions.
      cbp_jax.data.DatasetUnavailable: a dataset is not on this machine.
      FileNotFoundError: a file of a dataset or of the encoder is missing.
    """
    texts = [data.load_text(name, data_dir=settings.data_dir) for name in settings.tasks]
    for found in texts:
        if len(found.label_names) < 2:
            raise ValueError(f"tasks must have at least 2 classes, and {found.name!r} has {len(found.label_names)}")
        if "train" not in found.splits or not _test_split(found):
            raise ValueError(f"tasks must have a split 'train' and one of {_TEST_SPLITS}; {found.name!r} has "
                             f"{list(found.splits)}")  # fmt: skip
    folder = _folder_of(settings.encoder)
    if folder is None:
        tokenizer: Any = data.WordTokenizer.of(
            (found.texts[n] for found in texts for n in found.splits["train"]), settings.vocabulary
        )
        encoder = nets.Bert(
            tokenizer.vocabulary,
            settings.width,
            settings.depth or 2,
            heads=2,
            hidden=2 * settings.width,
            positions=settings.length,
            dropout_rate=settings.dropout_rate,
            pooler=False,
        )
        params, name = None, FROM_NOTHING
    else:
        tokenizer, name = data.FileTokenizer(folder), folder.name
        if folder == nets.installed_encoder():
            name = "all-MiniLM-L6-v2 (a sentence encoder, tuned contrastively)"
        encoder, variables = nets.load_bert(folder, depth=settings.depth, dropout_rate=settings.dropout_rate)
        _check_encoder(settings, folder, tokenizer, encoder)
        # The text's vector is the mean over its tokens. The pooler is not used, and would count among the weights.
        params = {part: leaves for part, leaves in variables["params"].items() if part != "pooler"}
        encoder = encoder.copy(pooler=False)
    tasks, first = [], 0
    for found in texts:
        tokens = found.tokenize(tokenizer, settings.length)
        train = {seed: tokens.take("train", settings.train_texts, seed) for seed in seeds_of(settings)}
        test = tokens.take(_test_split(found), settings.test_texts)
        tasks.append(Task(found.name, range(first, first + tokens.num_classes), train, test))
        first += tokens.num_classes
    return Prepared(encoder, params, name, tuple(tasks))


def _check_encoder(settings: TextSettings, folder: Path, tokenizer: data.FileTokenizer, encoder: nets.Bert) -> None:
    """Raise a ValueError if the encoder does not know all tokens, or has too few positions."""
    if tokenizer.vocabulary > encoder.vocabulary:
        raise ValueError(
            f"encoder {folder}: tokenizer.json has {tokenizer.vocabulary} tokens, and the network only "
            f"{encoder.vocabulary}; they must be of the same model"
        )
    if settings.length > encoder.positions - encoder.position_offset:
        raise ValueError(
            f"length must be at most {encoder.positions - encoder.position_offset}, the positions of {folder}, got "
            f"{settings.length}"
        )


def _test_split(texts: data.Texts) -> str:
    return next((split for split in _TEST_SPLITS if split in texts.splits), "")


def _folder_of(encoder: str) -> Path | None:
    if encoder == FROM_NOTHING:
        return None
    if encoder == "auto":
        folder = nets.installed_encoder()
        return folder if folder is not None and importlib.util.find_spec("tokenizers") is not None else None
    return Path(encoder).expanduser()


def key_of(seed: chex.Array, purpose: int) -> chex.PRNGKey:
    """Return the key of a random stream of a seed."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def batches(
    parts: Sequence[tuple[Task, int, int]], seed: int, steps: int, classes: Mapping[str, np.ndarray], salt: int
) -> Batch:
    """Return batches of a seed for a whole task, on the host. Each part is shuffled again in every epoch.

    Args:
      parts: tuples of a task, its number of texts in each batch, and the number of its training texts to use.
      seed: the seed whose training texts are used.
      steps: how many batches.
      classes: by the task's name, which classes are options, bool [classes].
      salt: changes the order, such as the position of the task in a sequence.

    Returns:
      arrays [steps, batch, ...].
    """
    found = []
    for number, (task, count, among) in enumerate(parts):
        texts = task.train[seed]
        draw = np.random.default_rng((seed, salt, number, _BATCHES))
        size, needed = min(among, len(texts)), steps * count
        order = np.concatenate([draw.permutation(size) for _ in range(-(-needed // size))])[:needed]
        chosen = order.reshape(steps, count)
        asked = np.broadcast_to(classes[task.name], (steps, count, len(classes[task.name])))
        labels = texts.labels[chosen] + np.int32(task.classes.start)
        found.append(Batch(texts.tokens[chosen], texts.lengths[chosen], texts.types[chosen], labels, asked))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays, 1), *found)


def loss_of(logits: chex.Array, batch: Batch) -> chex.Array:
    """Return the mean cross-entropy over the classes that are options."""
    logits = jnp.where(batch.classes, logits, _NEVER)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def schedule(settings: TextSettings, learning_rate: float) -> optax.Schedule:
    """Return the learning rate over the updates of a task."""
    rise = max(round(settings.warmup * settings.steps), 1)

    def at(count):
        falling = (settings.steps - count) / max(settings.steps - rise, 1)
        return learning_rate * jnp.minimum((count + 1) / rise, jnp.maximum(falling, 0.0))

    return at


def fit(
    apply: Callable[..., chex.Array],
    tx: optax.GradientTransformation,
    trained: Any,
    frozen: Any,
    texts: Batch,
    seed: chex.Array,
    penalty: Callable[[Any], chex.Array] = lambda trained: 0.0,
) -> tuple[Any, chex.Array]:
    """Train on batches, one update each.

    Args:
      apply: `apply(trained, frozen, batch, dropout key) -> logits`.
      tx: the optimizer.
      trained: the parameters that are trained.
      frozen: the parameters that are not.
      texts: arrays [steps, batch, ...].
      seed: of dropout.
      penalty: a function of the trained parameters that is added to the loss.

    Returns:
      the trained parameters, and the mean loss without the penalty.
    """
    key = key_of(seed, _DROPOUT)

    def step(carry, inputs):
        trained, state = carry
        number, batch = inputs

        def loss_fn(trained):
            loss = loss_of(apply(trained, frozen, batch, jax.random.fold_in(key, number)), batch)
            return loss + penalty(trained), loss

        grads, loss = jax.grad(loss_fn, has_aux=True)(trained)
        updates, state = tx.update(grads, state, trained)
        return (optax.apply_updates(trained, updates), state), loss

    steps = jnp.arange(len(texts.labels))
    (trained, _), losses = jax.lax.scan(step, (trained, tx.init(trained)), (steps, texts))
    return trained, jnp.mean(losses)


def correct(net: nets.TextClassifier, params: Any, batch: Batch) -> chex.Array:
    """Return the accuracy among the classes that are options, one batch at a time, [batches, ...]."""

    def one(batch):
        logits = net.apply({"params": params}, batch.tokens, batch.mask, batch.types)
        found = jnp.argmax(jnp.where(batch.classes, logits, _NEVER), -1)
        there = batch.labels >= 0
        return jnp.sum((found == batch.labels) & there), jnp.sum(there)

    right, count = jax.lax.map(one, batch)
    return jnp.sum(right) / jnp.sum(count)


def evaluation_batches(task: Task, classes: np.ndarray, size: int, count: int) -> Batch:
    """Return the test texts of a task in `count` batches, padded with texts of label -1, which do not count."""
    texts, total = task.test, size * count

    def filled(array, value=0):
        pad = [(0, total - len(array))] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, pad, constant_values=value).reshape(count, size, *array.shape[1:])

    asked = np.broadcast_to(classes, (count, size, len(classes)))
    labels = filled(texts.labels + np.int32(task.classes.start), -1)
    return Batch(filled(texts.tokens), filled(texts.lengths), filled(texts.types), labels, asked)
