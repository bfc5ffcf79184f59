import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from keyword_tasks import write_tasks

from cbp_jax import data, nets, safetensors
from cbp_jax.experiments import texts
from cbp_jax.experiments.texts import Batch, TextSettings, batches, check, evaluation_batches, fit, loss_of, prepare

SMALL = {"seeds": 2, "width": 8, "vocabulary": 40, "length": 8, "train_texts": 30, "test_texts": 10, "steps": 5}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return TextSettings(tasks=write_tasks(folder, ("animals", "three")), encoder="none", **SMALL)


@pytest.fixture(scope="module")
def prepared(settings):
    return prepare(settings)


def test_an_encoder_from_scratch_and_tasks(prepared):
    assert (prepared.params, prepared.name, prepared.num_classes) == (None, "none", 5)
    assert (prepared.encoder.depth, prepared.encoder.width, prepared.encoder.hidden) == (2, 8, 16)
    assert [task.classes for task in prepared.tasks] == [range(2), range(2, 5)]
    assert prepared.class_masks().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    for task in prepared.tasks:
        assert [len(train) for train in task.train.values()] == [30, 30] and len(task.test) == 10
        assert (task.train[0].tokens != task.train[1].tokens).any()  # each seed has other training texts
    init = jax.jit(prepared.init)
    one, other = init(0, 0), init(0, 1)
    assert one["head"]["kernel"].shape == (8, 5) and not one["head"]["kernel"].any()
    tables = [params["encoder"]["word_embeddings"]["embedding"] for params in (one, other)]
    assert (tables[0] != tables[1]).all()


def test_runs_with_a_later_first_seed_have_the_texts_of_a_longer_run(settings, prepared):
    later = prepare(dataclasses.replace(settings, first_seed=1, seeds=1))
    for task, expected in zip(later.tasks, prepared.tasks, strict=True):
        assert list(task.train) == [1]
        np.testing.assert_array_equal(task.train[1].tokens, expected.train[1].tokens)


def test_all_seeds_start_from_the_pretrained_encoder(tmp_path, monkeypatch):
    net = nets.Bert(vocabulary=40, width=8, depth=2, heads=2, hidden=12, positions=8)
    rng, names = np.random.default_rng(0), nets.hugging_face_names(net)
    config = {"model_type": "bert", "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 8, "type_vocab_size": 2}
    like = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = names[jax.tree_util.keystr(path, simple=True, separator="/")]
        shape = leaf.shape
        if name.endswith("weight") and leaf.ndim == 3:
            shape = (8, 8)
        elif leaf.ndim == 2 and "kernel" in str(path):
            shape = shape[::-1]
        elif leaf.ndim == 2 and name.endswith("bias"):
            shape = (8,)
        tensors[name] = rng.normal(size=shape).astype(np.float32)
    folder = tmp_path / "little-bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.write(folder / "model.safetensors", tensors)
    monkeypatch.setattr(data, "FileTokenizer", lambda path: data.WordTokenizer(("cat", "dog", "oak", "elm")))
    settings = TextSettings(tasks=write_tasks(tmp_path, ("animals",)), encoder=str(folder), depth=1, **SMALL)
    found = prepare(settings)
    assert (found.name, found.encoder.depth, found.encoder.pooler) == ("little-bert", 1, False)
    assert not {"pooler", "layer1_mlp1"} & found.params.keys()
    params = jax.jit(found.init)(found.params, 3)
    word = params["encoder"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(word, tensors["embeddings.word_embeddings.weight"])
    tokens = found.tasks[0].test.tokens
    assert jax.eval_shape(found.net.apply, {"params": params}, tokens).shape == (10, 2)
    with pytest.raises(ValueError, match=r"length must be at most \d+, the positions of .*little-bert, got 1000"):
        prepare(dataclasses.replace(settings, length=1000))
    monkeypatch.setattr(data, "FileTokenizer", lambda path: data.WordTokenizer(tuple(map(str, range(1000)))))
    with pytest.raises(ValueError, match=r"tokenizer.json has 1004 tokens, and the network only \d+"):
        prepare(settings)


def test_the_default_encoder(monkeypatch, tmp_path):
    monkeypatch.setattr(nets, "installed_encoder", lambda: None)
    assert texts._folder_of("auto") is None
    monkeypatch.setattr(nets, "installed_encoder", lambda: tmp_path)
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)  # as if tokenizers was not installed
    assert texts._folder_of("auto") is None
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: sys)
    assert texts._folder_of("auto") == tmp_path and texts._folder_of("none") is None
    assert texts._folder_of("~/model").is_absolute()


def test_batches_are_epochs(prepared):
    task, classes = prepared.tasks[1], {"three": np.array([False, False, True, True, True])}
    found = batches([(task, 6, 100)], 1, 10, classes, 0)  # two epochs of 30 texts
    assert found.tokens.shape == (10, 6, 8) and found.classes.shape == (10, 6, 5)
    rows = np.concatenate([found.tokens, found.labels[..., None]], 2).reshape(60, -1)
    texts_of_seed = np.concatenate([task.train[1].tokens, task.train[1].labels[:, None] + 2], 1)
    for epoch in (rows[:30], rows[30:]):
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, texts_of_seed))
    assert (rows[:30] != rows[30:]).any()
    again, other = (batches([(task, 6, 100)], 1, 10, classes, salt) for salt in (0, 1))
    np.testing.assert_array_equal(found.tokens, again.tokens)
    assert (found.tokens != other.tokens).any()


def test_batches_of_several_tasks(prepared):
    first, second = prepared.tasks
    classes = {"animals": np.array([1, 1, 0, 0, 0], bool), "three": np.array([0, 0, 1, 1, 1], bool)}
    found = batches([(second, 3, 100), (first, 2, 4)], 0, 20, classes, 0)
    assert found.tokens.shape == (20, 5, 8)
    assert (found.labels[:, :3] >= 2).all() and (found.labels[:, 3:] < 2).all()
    np.testing.assert_array_equal(found.classes[7, 1], classes["three"])
    np.testing.assert_array_equal(found.classes[7, 4], classes["animals"])
    among = {tuple(row) for row in first.train[0].tokens[:4]}
    assert {tuple(row) for row in found.tokens[:, 3:].reshape(-1, 8)} == among


def test_the_loss_covers_only_the_given_classes():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5)), np.array([0, 1, 3, 4])
    asked = np.array([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    batch = Batch(None, None, None, jnp.asarray(labels), jnp.asarray(asked))
    each = [-row[label] + np.log(np.exp(row[there]).sum())
            for row, label, there in zip(logits, labels, asked, strict=True)]  # fmt: skip
    loss, grads = jax.value_and_grad(loss_of)(jnp.asarray(logits, jnp.float32), batch)
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-5)
    assert not grads[~asked].any()


def test_the_learning_rate_rises_and_falls():
    rate = texts.schedule(TextSettings(steps=20, warmup=0.25), 0.1)
    values = np.array([float(rate(n)) for n in range(20)])
    np.testing.assert_allclose(values[:5], 0.1 * np.array([0.2, 0.4, 0.6, 0.8, 1.0]), rtol=1e-5)
    np.testing.assert_allclose(values[5:], 0.1 * np.arange(15, 0, -1) / 15, rtol=1e-5)


def test_fitting_equals_a_plain_loop_of_updates(prepared):
    """A linear model on word counts, with a penalty, is compared with NumPy."""
    task = prepared.tasks[0]
    batch = batches([(task, 6, 100)], 0, 5, {"animals": np.array([1, 1, 0, 0, 0], bool)}, 0)
    counts = np.stack([np.stack([np.bincount(row, minlength=40) for row in rows]) for rows in batch.tokens])
    apply = lambda w, scale, batch, key: scale * jax.nn.one_hot(batch.tokens, 40).sum(1) @ w
    start = np.random.default_rng(0).normal(size=(40, 5))
    trained, loss = jax.jit(
        lambda w: fit(apply, optax.sgd(0.1), w, 2.0, batch, 0, lambda w: 0.5 * jnp.square(w).sum())
    )(jnp.asarray(start, jnp.float32))
    w, losses = start.copy(), []
    for x, y in zip(2.0 * counts, batch.labels, strict=True):
        z = np.exp((x @ w)[:, :2])
        p = z / z.sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(6), y]).mean())
        error = np.zeros((6, 5))
        error[:, :2] = p - np.eye(2)[y]
        w -= 0.1 * (x.T @ error / 6 + w)
    np.testing.assert_allclose(trained, w, atol=1e-4)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)


def test_accuracy_ignores_padding_of_the_last_batch(prepared):
    task, net = prepared.tasks[1], prepared.net
    asked = prepared.class_masks()[1]
    batch = evaluation_batches(task, asked, 4, 4)  # 10 texts in 16 places
    assert batch.tokens.shape == (4, 4, 8) and (batch.labels.ravel()[10:] == -1).all()
    params = jax.jit(prepared.init)(0, 0)
    rng = np.random.default_rng(0)
    params["head"] = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params["head"])
    logits = np.array(jax.jit(net.apply)({"params": params}, task.test.tokens, task.test.mask, task.test.types))
    logits[:, :2] = -np.inf
    expected = (logits.argmax(1) == task.test.labels + 2).mean()
    assert 0 < expected < 1
    assert float(texts.correct(net, params, batch)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"tasks": ()}, "tasks must be at least one and all different"),
        ({"tasks": ("a", "a")}, "tasks must be at least one and all different"),
        ({"length": 3}, "length must be at least 4, got 3"),
        ({"vocabulary": 4}, "vocabulary must be at least 5, got 4"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"dropout_rate": -0.1}, "dropout_rate must be in"),
        ({"lanes": "turns"}, "lanes must be 'auto', 'vmap' or 'map', got 'turns'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(TextSettings(), **changes))


def test_bad_tasks(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "a", "label": "x", "split": "train"}\n')
    with pytest.raises(ValueError, match="tasks must have at least 2 classes, and 'one' has 1"):
        prepare(TextSettings(tasks=(str(tmp_path / "one.jsonl"),), encoder="none"))
    rows = [{"text": "a", "label": label} for label in ("x", "y")]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"tasks must have a split 'train' and one of .*; 'two' has \['train'\]"):
        prepare(TextSettings(tasks=(str(tmp_path / "two.jsonl"),), encoder="none"))
    with pytest.raises(ValueError, match="learning_rate must be finite and not negative, got inf"):
        texts.check_numbers(None, learning_rate=float("inf"))
