"""Adapters in the formats of mlx-lm and llama.cpp."""

import json
import pathlib

import chex
import gguf
import numpy as np
import pytest
from helpers import assert_same_bits, write_peft
from stored import export, tensors_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import abstract_params, read_config
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.tiny import save_tiny

Q, DOWN = (f"model.layers.{x}" for x in ("0.self_attn.q_proj", "1.mlp.down_proj"))
SHAPES = {Q: (64, 64), DOWN: (64, 128)}  # [N, K] of the tiny model
RANKS = {Q: 4, DOWN: 2}


class Model:
    def __init__(self, folder):
        self.folder = save_tiny(folder)
        self.config = read_config(self.folder)
        self.base, self.names = abstract_params(self.config), decoder_names(self.config)

    def load(self, adapter):
        return ql.io.load_peft(adapter, self.base, self.names)[1:]

    def export(self, form, out, adapter):
        export(self.folder, form, out, adapter)
        return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("servers") / "model")


def draw(ranks):
    rng = np.random.default_rng(0)

    def pair(r, n, k):
        return (rng.normal(size=(r, k)), rng.normal(size=(n, r)))

    return {
        module: [x.astype(np.float16) for x in pair(ranks[module], *shape)]
        for module, shape in SHAPES.items()
    }


def test_what_we_write_is_read_to_the_bit(model, tmp_path):
    settings = {"r": 4, "use_rslora": True, "rank_pattern": {"down_proj": 2}}
    settings |= {"alpha_pattern": {"q_proj": 3}, "target_modules": [*SHAPES]}
    write_peft(tmp_path / "peft", draw(RANKS), **settings)
    want = ql.io.portable(model.base, model.load(tmp_path / "peft")[0])
    file = model.export("mlx", tmp_path / "mlx", tmp_path / "peft")
    again = model.export("peft", tmp_path / "again", file)
    assert_same_bits(model.load(again)[0], want)
    twice = model.export("mlx", tmp_path / "twice", file)

    def read_bytes(folder):
        return [file.read_bytes() for file in sorted(folder.iterdir())]

    assert read_bytes(twice) == read_bytes(file)


def test_a_file_for_llama_cpp_has_one_alpha_and_rows_in_its_order(model, tmp_path):
    factors = draw(RANKS)
    settings = {"r": 4, "rank_pattern": {"down_proj": 2}, "target_modules": [*SHAPES]}
    write_peft(tmp_path / "peft", factors, lora_alpha=12, **settings)
    file = model.export("gguf-lora", tmp_path / "lora.gguf", tmp_path / "peft")
    reader = gguf.GGUFReader(file)
    # llama.cpp scales A by alpha / rank.
    alpha = reader.fields["adapter.lora.alpha"].contents()
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    names = {Q: "blk.0.attn_q.weight", DOWN: "blk.1.ffn_down.weight"}
    for module, name in names.items():
        a, b = (np.float32(x) for x in factors[module])
        if module == Q:  # rows i and i + Dh/2 of each of four heads follow each other
            b = b.reshape(4, 2, 8, 4).swapaxes(1, 2).reshape(64, 4)
        stored_a, stored_b = (stored[f"{name}.lora_{part}"] for part in "ab")
        scaling = alpha / len(stored_a)
        expected = 12 / RANKS[module] * b @ a
        assert_close(scaling * stored_b @ stored_a, expected)


def check_adapter(model, lora, config, tmp_path, factors):
    ql.io.save_peft(tmp_path / "peft", model.base, lora, model.names, config)
    expected = write_peft(tmp_path / "wanted", factors)
    chex.assert_trees_all_equal(tensors_of(tmp_path / "peft"), expected)


def write_mlx(folder, factors, change=None, **settings):
    """Writes as `mlx_lm.lora` does: A is `[K, rank]`, and B is `[rank, N]`."""
    folder.mkdir()
    tensors = {
        f"{module}.lora_{part}": x.T
        for module, pair in factors.items()
        for part, x in zip("ab", pair, strict=True)
    }
    tensors = {k: x for k, x in (tensors | (change or {})).items() if x is not None}
    ql.io.write_safetensors(folder / "adapters.safetensors", tensors)
    parameters = {"rank": 4, "dropout": 0.0, "scale": 20.0}
    raw = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps({**raw, **settings}))


def test_mlx_folders_are_read(model, tmp_path):
    factors = draw(dict.fromkeys(SHAPES, 4))
    write_mlx(tmp_path / "mlx", factors, lora_parameters={
        "rank": 4, "dropout": 0.05, "scale": 20.0,
        "keys": ["self_attn.q_proj", "mlp.down_proj"],
    })  # fmt: skip
    lora, config = model.load(ql.io.read_mlx(tmp_path / "mlx"))
    assert {config.scaling_of(module) for module in SHAPES} == {20}
    assert config.lora_dropout == 0.05
    check_adapter(model, lora, config, tmp_path, factors)


FEW = {"rank": 4, "scale": 20.0, "keys": ["mlp.down_proj"]}
ODD = FEW | {"alpha": 16}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"fine_tune_type": "dora"}, "`fine_tune_type` must be .lora.. Got 'dora'"),
        ({}, {"fine_tune_type": "full"}, "Got 'full': fuse it into the model"),
        ({}, {"lora_parameters": None}, "`lora_parameters` must be given"),
        ({}, {"lora_parameters": ODD}, "`alpha` is not known"),
        ({}, {"lora_parameters": FEW}, "q_proj.lora_a: unexpected"),
        ({}, {"lora_parameters": {"rank": 4}}, "`scale` must be a positive number"),
        ({}, {"lora_parameters": {"rank": 8, "scale": 1}}, "rank must be 8. Got .*, 4"),
        ({f"{Q}.lora_b": None}, {}, "q_proj.lora_B.weight: missing"),
        ({f"{Q}.m": np.ones(64)}, {}, "q_proj.m: unexpected"),
        ({"model.x.lora_a": np.ones((9, 4))}, {}, "'model.x' matches no module"),
        ({f"{Q}.lora_b": np.ones((4, 9), "f")}, {}, r"must be \(64, 4\). Got \(9, 4\)"),
    ],
)
def test_mlx_folders_are_refused_by_name(model, tmp_path, change, settings, message):
    factors = draw(dict.fromkeys(SHAPES, 4))
    write_mlx(tmp_path / "mlx", factors, change, **settings)
    with pytest.raises(ql.io.CheckpointError, match=message):
        model.load(ql.io.read_mlx(tmp_path / "mlx"))


def test_ranks_that_differ_are_not_for_mlx(tmp_path):
    factors = {m: dict(zip("ab", pair, strict=True)) for m, pair in draw(RANKS).items()}
    with pytest.raises(ValueError, match=r"`adapter` must have one rank. Got \[2, 4\]"):
        ql.io.save_mlx(tmp_path, ql.io.PlainLoRA(8.0, factors), 2)
    inner_ranks = {"x": {"a": np.ones((2, 8)), "b": np.ones((8, 4))}}
    with pytest.raises(ValueError, match=r"`adapter` must have one rank. Got \[2, 4\]"):
        ql.io.save_mlx(tmp_path, ql.io.PlainLoRA(8.0, inner_ranks), 2)
    without_b = {"x": {"a": np.ones((2, 8))}}
    with pytest.raises(
        ValueError, match="must have matrices `a` and `b` of these modules:\n  x"
    ):
        ql.io.save_mlx(tmp_path, ql.io.PlainLoRA(8.0, without_b), 2)
    assert not [*pathlib.Path(tmp_path).iterdir()]
