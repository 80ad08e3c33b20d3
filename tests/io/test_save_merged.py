"""Errors of `save_merged`. tests/interop compares its files with PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql

NAMES = ql.io.Names({"up/kernel": "up.weight", "norm/scale": "norm.weight"})


def save(path, base, lora, **settings):
    config = {"model_type": "mine"}
    ql.io.save_merged(path, base, lora, NAMES, config, progress=False, **settings)


def test_a_trained_leaf_of_another_size_is_refused(tmp_path):
    def tree(n):
        return {
            "norm": {"scale": jnp.ones(n)},
            "up": {"kernel": jnp.ones((4, 2))},
        }

    save(tmp_path / "base", tree(4), {})
    config = ql.QLoRAConfig(fmt=None, targets="up/.*", trainable="norm/.*", rank=1)
    for size in (4, 5):
        _, lora = ql.init(jax.random.key(0), tree(size), config)
        if size == 4:
            save(tmp_path / "new", tmp_path / "base", lora)
            continue
        with pytest.raises(
            ql.io.CheckpointError, match=r"norm.weight \(must be \(4,\)"
        ):
            save(tmp_path / "out", tmp_path / "base", lora)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_a_dtype_does_not_hold_are_refused(tmp_path, dtype):
    base = {"up": {"kernel": jnp.full((4, 2), 1e5, dtype)}}
    save(tmp_path / "new", base, {}, dtype="float32")
    with pytest.raises(ql.io.CheckpointError, match="up.weight must be finite after"):
        save(tmp_path / "out", base, {}, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_experts_are_stacked_in_the_order_of_their_numbers(tmp_path):
    # A file lists 10 and 11 before 2.
    experts = {f"experts.{i}": np.full((3, 2), i, np.float32) for i in range(12)}
    experts["experts.router"] = np.ones((3, 2), np.float32)
    (tmp_path / "base").mkdir()
    ql.io.write_safetensors(tmp_path / "base" / "model.safetensors", experts)
    names = ql.io.Names({"experts/kernel": ql.io.Entry("experts.{expert}", "kn")})
    arguments = tmp_path / "base", {}, names, {"model_type": "mine"}
    ql.io.save_merged(tmp_path / "new", *arguments, progress=False)
    tensors = ql.io.open_safetensors(tmp_path / "new")
    assert {*tensors} == {"experts", "experts.router"}
    expected = np.broadcast_to(np.arange(12)[:, None, None], (12, 2, 3))
    np.testing.assert_array_equal(tensors["experts"][...], expected)


def test_numbered_vectors_and_incomplete_stacks_stay_separate(tmp_path):
    names = ql.io.Names(
        {
            "scales": "scales.{layer}",
            "kernel": ql.io.Entry("w.{layer}", "kn", numbers={"layer": (1, 3)}),
        }
    )
    base = {"scales": np.ones((2, 3), np.float32), "kernel": np.ones((2, 4, 5))}
    base = jax.tree.map(jnp.asarray, base)
    config = {"model_type": "mine"}
    ql.io.save_merged(tmp_path / "new", base, {}, names, config, progress=False)
    tensors = ql.io.open_safetensors(tmp_path / "new")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected = {"scales.0": (3,), "scales.1": (3,), "w.1": (5, 4), "w.3": (5, 4)}
    assert shapes == expected


def test_adapters_of_only_the_first_layers_are_refused(tmp_path):
    names = ql.io.Names({"up/kernel": ql.io.Entry("layers.{layer}.up", "kn")})
    config = ql.QLoRAConfig(fmt=None, rank=1)

    def save_layers(path, base, lora):
        settings = {"model_type": "mine"}
        ql.io.save_merged(path, base, lora, names, settings, progress=False)

    for num_layers in (3, 2):
        params = {"up": {"kernel": jnp.ones((num_layers, 4, 2))}}
        base, lora = ql.init(jax.random.key(0), params, config)
        if num_layers == 3:
            save_layers(tmp_path / "base", base, {})
            save_layers(tmp_path / "new", tmp_path / "base", lora)
            continue
        with pytest.raises(ValueError, match=r"\[2\], so layers.2.up has no ad"):
            save_layers(tmp_path / "out", tmp_path / "base", lora)
    assert not (tmp_path / "out").exists()


def test_dtypes_of_integers_are_refused(tmp_path):
    base = {"up": {"kernel": jnp.ones((4, 2))}}
    with pytest.raises(TypeError, match="`dtype` must be a floating dtype"):
        save(tmp_path / "out", base, {}, dtype="int8")
    assert not (tmp_path / "out").exists()


def write_folder(path, tensors, config):
    path.mkdir()
    ql.io.write_safetensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))


def test_integers_in_a_folder_keep_their_dtype(tmp_path):
    weight, ids = np.ones((2, 4), np.float32), np.arange(300)
    tensors = {"up.weight": weight, "position_ids": ids}
    write_folder(tmp_path / "base", tensors, {"model_type": "mine"})
    arguments = tmp_path / "base", {}, NAMES
    ql.io.save_merged(tmp_path / "new", *arguments, dtype="bfloat16", progress=False)
    written = ql.io.open_safetensors(tmp_path / "new")
    assert written["up.weight"].dtype == "bfloat16"
    np.testing.assert_array_equal(written["position_ids"], ids)
    assert written["position_ids"].dtype == np.int64


@pytest.mark.parametrize("trainable", [(), "up/.*"])
def test_adapters_of_integers_are_refused(trainable, tmp_path):
    tensors = {"up.weight": np.ones((2, 4), np.int8)}
    write_folder(tmp_path / "base", tensors, {"model_type": "mine"})
    params = {"up": {"kernel": jnp.ones((4, 2))}}
    targets = () if trainable else "up/.*"
    config = ql.QLoRAConfig(fmt=None, rank=1, targets=targets, trainable=trainable)
    _, lora = ql.init(jax.random.key(0), params, config)
    with pytest.raises(ValueError, match=r"up.weight .*must be one of .*, is int8"):
        ql.io.save_merged(tmp_path / "out", tmp_path / "base", lora, NAMES)
    assert not (tmp_path / "out").exists()


def test_settings_of_packed_weights_are_removed_from_a_text_config(tmp_path):
    quantization = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    config = {"model_type": "mine", "text_config": {"vocab_size": 8} | quantization}
    write_folder(tmp_path / "base", {"up.weight": np.ones((2, 4), np.float32)}, config)
    arguments = tmp_path / "base", {}, NAMES
    ql.io.save_merged(tmp_path / "new", *arguments, progress=False)
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written == {"model_type": "mine", "text_config": {"vocab_size": 8}}


def test_files_of_tokenizers_and_processors_are_copied(tmp_path):
    base, new = tmp_path / "base", tmp_path / "new"
    write_folder(base, {"up.weight": np.ones((2, 4), np.float32)}, {"model_type": "m"})
    processors = {"preprocessor_config.json", "processor_config.json"}
    processors |= {"chat_template.json", "video_preprocessor_config.json"}
    tokenizers = {"vocab.txt", "sentencepiece.bpe.model", "spiece.model"}
    names = processors | tokenizers | {"additional_chat_templates/tool_use.jinja"}
    (base / "additional_chat_templates").mkdir()
    for name in names | {"modeling_m.py", "notes.txt"}:
        (base / name).write_text(name)
    ql.io.save_merged(new, base, {}, NAMES, progress=False)
    copied = {x.relative_to(new).as_posix() for x in new.rglob("*") if x.is_file()}
    assert copied - {"config.json", "model.safetensors"} == names
    assert all((new / name).read_text() == name for name in names)
    # A linked folder of templates would copy files from elsewhere.
    (base / "additional_chat_templates").rename(tmp_path / "outside")
    (base / "additional_chat_templates").symlink_to(tmp_path / "outside")
    with pytest.raises(ql.io.CheckpointError, match="must be in its folder"):
        ql.io.save_merged(tmp_path / "other", base, {}, NAMES, progress=False)
