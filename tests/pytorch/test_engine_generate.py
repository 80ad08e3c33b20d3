"""Models in PyTorch's code generate the same tokens as transformers."""

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from engine_models import save_model
from helpers import refusal

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.open_model import open_model
from qlora_jax.llm.models.generation import generate
from qlora_jax.llm.models.stream import Stream

PROMPTS = [[5, 90, 7, 9, 110, 3, 8], [50, 60], [*range(100, 117)]]
NUM_NEW = 10
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
# A window that is shorter than two of the prompts, and layers with convolutions.
WINDOW_LAYERS = ["sliding_attention", "full_attention"]
GEMMA = {"sliding_window": 6, "layer_types": WINDOW_LAYERS, **HEADS}
LFM = {"layer_types": ["conv", "full_attention"], **HEADS}
CASES = {
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
    "llama": (transformers.LlamaConfig, HEADS),
    "gemma3": (transformers.Gemma3TextConfig, GEMMA),
    "lfm2": (transformers.Lfm2Config, LFM),
}


def torch_tokens(model, prompts):
    """Returns the tokens that PyTorch generates for each prompt."""
    rows = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
        )
        rows.append(ids[0, len(prompt) :].tolist())
    return rows


def read_model(folder):
    """Returns a model in PyTorch's code, and its float weights as variables."""
    model = open_model(str(folder), engine="torch").read(progress=False)
    return model.engine.make_model(), {"params": model.base}


@pytest.mark.parametrize("kind", CASES)
def test_greedy_tokens_equal_those_of_pytorch(kind, tmp_path):
    config_class, changes = CASES[kind]
    sizes = {"num_hidden_layers": 2, **changes}
    folder = save_model(tmp_path / "model", config_class, **sizes)
    module = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = torch_tokens(module, PROMPTS)
    assert len(set(map(tuple, expected))) == len(PROMPTS)
    model, variables = read_model(folder)
    settings = {"max_new_tokens": NUM_NEW, "eos_ids": []}
    assert generate(model, variables, PROMPTS, **settings).tolist() == expected
    # The second prompt of a stream continues the first prompt and its answer.
    stream = Stream(model, variables)
    assert list(stream(PROMPTS[0], **settings)) == expected[0]
    longer = [*PROMPTS[0], *expected[0], 17, 18]
    assert list(stream(longer, **settings)) == torch_tokens(module, [longer])[0]


def test_sequences_longer_than_the_learned_positions_are_refused(tmp_path):
    changes = {"n_layer": 1, "max_position_embeddings": 32}
    folder = save_model(tmp_path / "model", transformers.GPT2Config, **changes)
    model, variables = read_model(folder)
    with pytest.raises(ValueError, match="at most 32 tokens together"):
        generate(model, variables, [[5] * 30], max_new_tokens=3, eos_ids=[])


def test_caches_have_a_position_for_each_token(tmp_path):
    folder = save_model(tmp_path / "model", transformers.GPTNeoXConfig)
    language_model = ql.torch.open_language_model(folder)
    model = ql.torch.CachedModel(language_model)
    shapes = language_model.shapes(stacked=False)
    params = {name: jnp.ones(x.shape, x.dtype) for name, x in shapes.items()}
    cache = model.init_cache(num_rows=2, length=4)
    ids = jnp.ones((2, 3), jnp.int32)

    def run(starts, num_tokens=None):
        return model.apply({"params": params}, ids, cache, starts, num_tokens)

    full = jnp.array([1, 0])
    assert jnp.isfinite(run(full)[0]).all()
    assert jnp.isfinite(jax.jit(run)(full)[0]).all()
    assert jnp.isfinite(run(jnp.array([3, 0]), jnp.array([1, 3]))[0]).all()
    message = "Got 4 positions for 5 tokens"
    refusal(lambda: run(jnp.array([0, 2])), message)
    refusal(lambda: run(jnp.array([0, 3]), jnp.array([3, 2])), message)
    refusal(lambda: run(jnp.array([-1, 0])), "`starts` must not be negative. Got -1.")
    refusal(lambda: model.init_cache(2, 0), "`length` must be at least 1. Got 0.")


def test_models_that_cannot_generate_are_refused(tmp_path):
    # The first GPT reads all tokens again for each new one.
    folder = save_model(tmp_path / "model", transformers.OpenAIGPTConfig, n_layer=2)
    config = app.GenerateConfig(str(folder), prompt="A", engine="torch")
    with pytest.raises(ValueError, match="`model` must be able to generate"):
        app.generate(config)
