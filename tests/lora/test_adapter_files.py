import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbp_jax import lora, nets, safetensors, units

SHAPES = {
    "conv": {"kernel": (3, 2, 4, 5)},
    "embed": {"embedding": (9, 4)},
    "attention": {"query": {"kernel": (4, 2, 3)}, "out": {"kernel": (2, 3, 4)}},
    "head": {"kernel": (4, 3)},
}
PARAMS = {"params": jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda node: isinstance(node, tuple))}


def make(**settings):
    rng = np.random.default_rng(0)
    adapter = lora.init(PARAMS, 0, rank=2, alpha=6, **settings)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), adapter)


def test_an_adapter_is_the_same_after_saving_and_loading(tmp_path):
    adapter = make()
    found = lora.load(lora.save(adapter, tmp_path / "adapter"), PARAMS)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    some = make(target_modules=["query", "head"])
    found = lora.load(lora.save(some, tmp_path / "some"), PARAMS)
    assert list(found.factors) == ["params/attention/query/kernel", "params/head/kernel"]


def test_the_format_is_that_of_peft(tmp_path):
    """A is [rank, in] and B is [out, rank]; the change of a PyTorch layer is alpha / rank B A."""
    adapter = make()
    lora.save(adapter, tmp_path)
    tensors, change = safetensors.read(tmp_path / "adapter_model.safetensors"), lora.delta(adapter)["params"]
    get = lambda module, name: np.asarray(tensors[f"base_model.model.{module}.lora_{name}"], np.float64)
    product = lambda module: 3 * get(module, "B.weight") @ get(module, "A.weight")
    np.testing.assert_allclose(product("head"), change["head"]["kernel"].T, rtol=1e-5)
    query, out = (change["attention"][name]["kernel"] for name in ("query", "out"))
    np.testing.assert_allclose(product("attention.query"), np.asarray(query).reshape(4, 6).T, rtol=1e-4)
    np.testing.assert_allclose(product("attention.out"), np.asarray(out).reshape(6, 4).T, rtol=1e-4)
    a, b = get("conv", "A.weight"), get("conv", "B.weight")
    assert (a.shape, b.shape) == ((2, 4, 3, 2), (5, 2, 1, 1))
    expected = np.transpose(change["conv"]["kernel"], (3, 2, 0, 1))  # [out, in, height, width]
    np.testing.assert_allclose(3 * np.einsum("or,rihw->oihw", b[:, :, 0, 0], a), expected, rtol=1e-4)
    table = 3 * (get("embed", "embedding_B") @ get("embed", "embedding_A")).T
    np.testing.assert_allclose(table, change["embed"]["embedding"], rtol=1e-4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 6)
    assert config["target_modules"] == ["attention.out", "attention.query", "conv", "embed", "head"]


NET = nets.Bert(vocabulary=20, width=8, depth=2, heads=2, hidden=12, positions=10, pooler=False)


def bert_adapter(seed=0):
    rng, tokens = np.random.default_rng(seed), jnp.zeros((1, 3), jnp.int32)
    fill = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), tree)
    params = fill(jax.eval_shape(NET.init, jax.random.key(0), tokens))
    return params, fill(lora.init(params, 0, rank=2, alpha=4, target_modules=["query", "value", "*_mlp1"]))


def test_names_of_bert(tmp_path):
    params, adapter = bert_adapter()
    names = nets.hugging_face_names(NET)
    lora.save(adapter, tmp_path, names=names)
    tensors = safetensors.read(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.encoder.layer.1.attention.self.query.lora_A.weight" in tensors
    found = lora.load(tmp_path, params, names=names.get)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    with pytest.raises(ValueError, match=r"no kernel for encoder\.layer\.0\.attention\.self\.query, .*; names says"):
        lora.load(tmp_path, params)


@pytest.mark.slow
def test_a_round_trip_through_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params, adapter = bert_adapter()
    names = nets.hugging_face_names(NET)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=10, hidden_act="gelu", layer_norm_eps=1e-12,
    )  # fmt: skip
    base = transformers.BertModel(config, add_pooling_layer=False)
    state = base.state_dict()
    for path, leaf in units.leaves_by_path(params).items():
        shape = tuple(state[names[path]].shape)
        # PyTorch's kernels are [out, in], with heads and their dimensions as one axis.
        matrix = np.asarray(leaf).reshape(shape[::-1]).T if path.endswith("kernel") else np.reshape(leaf, shape)
        state[names[path]] = torch.tensor(np.ascontiguousarray(matrix))
    base.load_state_dict(state)
    lora.save(adapter, tmp_path / "ours", names=names)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    tokens = np.array([[3, 4, 5, 6]])
    theirs = model(input_ids=torch.tensor(tokens)).last_hidden_state.detach().numpy()
    ours, _ = NET.apply(lora.apply(params, adapter), jnp.asarray(tokens, jnp.int32), jnp.ones((1, 4), bool))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    again = lora.load(tmp_path / "theirs", params, names=names)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, adapter)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora must be False, got True"),
        ({"rank_pattern": {"head": 4}}, r"rank_pattern must be \{\}, got \{'head': 4\}"),
        ({"r": 3}, r"attention\.out\.lora_A\.weight must be \[3, 6\], and is \[2, 6\]"),
    ],
)
def test_other_adapters(changes, message, tmp_path):
    lora.save(make(), tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        lora.load(tmp_path, PARAMS)


def test_incomplete_and_surplus_parts(tmp_path):
    lora.save(make(), tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = safetensors.read(weights)
    safetensors.write(weights, {**tensors, "base_model.model.attention.out.lora_B.bias": np.zeros(3, np.float32)}, {})
    with pytest.raises(ValueError, match=r"attention\.out\.lora_B\.bias is not part of a plain LoRA adapter"):
        lora.load(tmp_path, PARAMS)
    safetensors.write(weights, {}, {})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has no tensors"):
        lora.load(tmp_path, PARAMS)
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    with pytest.raises(ValueError, match=r"adapter_config\.json must have r and lora_alpha, lora_alpha is missing"):
        lora.load(tmp_path, PARAMS)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        lora.load(tmp_path, PARAMS)


def test_missing_files_and_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*adapter_config\.json"):
        lora.load(tmp_path, PARAMS)
    with pytest.raises(ValueError, match="names must have a module for 'params/attention/out/kernel'"):
        lora.save(make(), tmp_path, names={})
    with pytest.raises(ValueError, match="names must be different modules"):
        lora.save(make(), tmp_path, names=lambda path: "layer")
    stacked = lora.init({"stack": jnp.zeros((2, 3, 4))}, 0, rank=1, axes={"*": ((1,), (2,))})
    with pytest.raises(ValueError, match="kernel 'stack' is stacked with others"):
        lora.save(stacked, tmp_path)
