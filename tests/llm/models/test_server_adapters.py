"""Adapters in the formats of mlx-lm and llama.cpp."""

import json
import pathlib

import gguf
import numpy as np
import pytest
from helpers import write_peft
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


def test_a_folder_for_mlx_has_one_scale_and_transposed_factors(model, tmp_path):
    factors = draw(RANKS)
    settings = {"r": 4, "use_rslora": True, "rank_pattern": {"down_proj": 2}}
    settings |= {"alpha_pattern": {"q_proj": 3}, "target_modules": [*SHAPES]}
    write_peft(tmp_path / "peft", factors, lora_alpha=8, **settings)
    folder = model.export("mlx", tmp_path / "mlx", tmp_path / "peft")
    raw = json.loads((folder / "adapter_config.json").read_text())
    scale, stored = raw["lora_parameters"]["scale"], tensors_of(folder)
    assert len(stored) == 8  # those of the modules in the other layer are zeros
    for module, alpha in {Q: 3, DOWN: 8}.items():
        a, b = (np.float32(x) for x in factors[module])
        stored_a, stored_b = (stored[f"{module}.lora_{part}"] for part in "ab")
        expected = alpha / RANKS[module] ** 0.5 * b @ a
        assert_close(scale * (stored_a @ stored_b).T, expected)


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
