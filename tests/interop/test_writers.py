"""Each format of `export` in a program that reads it, with random targets.

The adapter must change the logits of the program, which must equal those of qlora_jax.
"""

import functools
import pathlib
import re
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
import torch
import transformers
from clients import llama_cpp, log_probabilities, mlx_logits
from configs import EXPERTS, OLMOE, SIZES, random_model
from helpers import SEED, relative_error, trees_of
from stored import export

import qlora_jax as ql
from qlora_jax.io.model_folder import read_config_json
from qlora_jax.llm.app.configs import AdapterFormat, PackedFormat
from qlora_jax.llm.models import tiny
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.trees.paths import leaves_by_path

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers

TOKENS = np.random.default_rng(0).integers(3, 256, (1, 24))
# Blocks of 32 and 64 fit, and the adapter has an effect in 4 bits.
SIZES = SIZES | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 272}
SIZES |= {"num_hidden_layers": 2, "initializer_range": 0.1}
SETTINGS = {
    "llama": {"tie_word_embeddings": False},
    "phi3": {},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4},
    "olmoe": OLMOE,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}


class Model(NamedTuple):
    """A random model of transformers: its folder, and our program and parameters."""

    folder: pathlib.Path
    params: dict
    logits: functools.partial

    @property
    def kernels(self):
        """The paths of the kernels that may be adapted."""
        paths = (path for path, _ in sorted(leaves_by_path(self.params).items()))
        return [x for x in paths if re.fullmatch(r"layers/.*/kernel", x)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns a function that makes a family's model, once."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind) / "model"
        random_model(kind, SIZES | SETTINGS[kind]).save_pretrained(folder)
        tiny.byte_tokenizer().save(str(folder / "tokenizer.json"))
        config, params = load(folder, progress=False)
        program = jax.jit(lambda x: Decoder(config).apply({"params": x}, TOKENS))
        return Model(folder, params, program)

    return make


def with_peft(model, out):
    return llama.logits_of(llama.their_model(model.folder, out), TOKENS)


def with_transformers(model, out):
    plain = transformers.CompressedTensorsConfig(run_compressed=False)
    packed = {"quantization_config": plain} if "format" in config_of(out) else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, **packed
    )
    return llama.logits_of(theirs.train(), TOKENS)


def config_of(folder):
    return read_config_json(folder).get("quantization_config", {})


def with_llama_cpp(*files):
    tokens = TOKENS[0].tolist()
    with llama_cpp(*files) as ask:
        return log_probabilities(ask, tokens)


def with_gguf_lora(model, out):
    base = out.with_name("base.gguf")
    export(model.folder, "gguf", base)
    return with_llama_cpp(base, out)


CLIENTS = {
    "peft": with_peft,
    "peft-portable": with_peft,
    "merged": with_transformers,
    "bitsandbytes": with_transformers,
    "compressed-tensors": with_transformers,
    "mxfp4": with_transformers,
    "nvfp4": with_transformers,
    "awq": lambda model, out: mlx_logits(TOKENS, out),
    "mlx": lambda model, out: mlx_logits(TOKENS, model.folder, out),
    "gguf": lambda model, out: with_llama_cpp(out),
    "gguf-lora": with_gguf_lora,
}
# Clients round weights or products themselves: to float16, or in E2M1 to bfloat16.
ROUNDED = dict.fromkeys(("gguf", "gguf-lora", "compressed-tensors"), 2e-3)
ROUNDED |= {"awq": 1e-2, "mxfp4": 2e-2, "nvfp4": 2e-2}
PEFT = ("peft", "peft-portable", "merged")
CASES = [("llama", form) for form in CLIENTS]
CASES += [("phi3", form) for form in ("peft", "gguf-lora")]
CASES += [(kind, form) for kind in [*SETTINGS][2:] for form in PEFT]


def test_each_format_has_a_client():
    formats = get_args(AdapterFormat) + get_args(PackedFormat) + ("merged", "gguf")
    assert CLIENTS.keys() == {*formats}


@pytest.mark.parametrize("kind, form", CASES)
def test_a_client_adds_an_adapter_of_random_targets(models, tmp_path, kind, form):
    model = models(kind)
    rng = np.random.default_rng([SEED, CASES.index((kind, form))])
    kernels = model.kernels
    experts = [x for x in kernels if "experts" in x]
    subsets = [[x for x in kernels if rng.random() < 0.5] or kernels[:1]]
    if experts and form != "merged":  # all but one kernel, one kernel, and all
        subsets += [experts[1:], [experts[1 - len(experts) % 2]], kernels]
    for i, targets in enumerate(subsets):
        # Gate and up have one rank in one parameter.
        dense = [x for x in targets if x not in experts]
        ranks = {x: 3 for x in dense[:1]} if form in PEFT and i == 0 else {}
        settings = dict(rank=2, alpha=4, targets=targets, rank_pattern=ranks)
        check_client(model, form, tmp_path / str(i), **settings)


def check_client(model, form, folder, **settings):
    base, lora = trees_of(model.params, fmt=None, **settings)
    bare, adapted = map(model.logits, (base, ql.merge(base, lora)))
    folder.mkdir()
    adapter, out = folder / "adapter.safetensors", folder / "out"
    ql.io.save(adapter, lora, ql.QLoRAConfig(fmt=None, **settings))
    sizes = {"block_size": 32} if form in ("awq", "compressed-tensors") else {}
    export(model.folder, form, out, adapter, **sizes)
    if form in get_args(PackedFormat):  # the merged weights are packed again
        _, packed = load(out, jnp.float32, progress=False)
        adapted = model.logits(ql.dequantize(packed))
    got = CLIENTS[form](model, out)
    if got.ndim == 1:  # log-probabilities of the token after the last
        bare, adapted = (jax.nn.log_softmax(x[0, -1]) for x in (bare, adapted))
    change = relative_error(bare, adapted)
    assert change > 0.05, settings["targets"]
    bound = ROUNDED.get(form, 1e-5)
    error = relative_error(got, adapted)
    assert error < bound, (settings["targets"], change)
