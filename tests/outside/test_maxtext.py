"""MaxText's transformer, which is independent of this library, in NNX and in bridges.

The configs are small and the weights random. MaxText's `DenseGeneral` and experts read
their kernels themselves. MaxText has its own scan over layers and two own bridges.
"""

import dataclasses
import os
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coming_from import code_blocks
from flax import nnx
from helpers import randomized
from nnx_contract import assert_equals_merged
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    maxtext = pytest.importorskip("maxtext")
    from maxtext.configs import pyconfig
    from maxtext.layers import nnx_wrappers
    from maxtext.models import models
    from maxtext.utils import maxtext_utils

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 8)))
POSITIONS = jnp.broadcast_to(jnp.arange(8), TOKENS.shape)
DENSE = [f"self_attention/{name}/kernel" for name in ("key", "out", "query", "value")]
DENSE += [f"mlp/{name}/kernel" for name in ("wi_0", "wi_1", "wo")]
# docs/coming_from/maxtext.md defines the contracted axes of kernels inside a bridge.
names = {"ql": ql}
exec(code_blocks("maxtext", "py")[1].split("base, lora")[0], names)
CONFIG = dataclasses.replace(names["config"], rank=4, alpha=8)


def make_config(**settings):
    """A tiny Llama. MaxText's default for `param_scan_axis` is 1."""
    tiny = dict(base_emb_dim=64, base_mlp_dim=96, head_dim=16, vocab_size=64)
    tiny |= dict(base_num_query_heads=4, base_num_kv_heads=2)
    tiny |= dict(base_num_decoder_layers=2, per_device_batch_size=2, param_scan_axis=0)
    tiny |= dict(max_target_length=8, max_prefill_predict_length=4)
    tiny |= dict(dtype="float32", attention="dot_product", remat_policy="none")
    path = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    return pyconfig.initialize(
        ["", path],
        run_name="test",
        enable_checkpointing=False,
        skip_jax_distributed_system=True,
        log_config=False,
        **tiny | settings,
    )


def make_mesh(config):
    devices = maxtext_utils.create_device_mesh(config, jax.devices()[:1])
    return jax.sharding.Mesh(devices, config.mesh_axes)


def make_model(**settings):
    config = make_config(**settings)
    return models.Transformer(config, make_mesh(config), None, rngs=nnx.Rngs(0))


def make_linen(**settings):
    config = make_config(**settings)
    return models.transformer_as_linen(config, make_mesh(config), None)


@nnx.jit
def logits(model):
    return model(TOKENS, POSITIONS, enable_dropout=False)


LAYERS = [f"decoder/layers_{i}/{name}" for i in range(2) for name in DENSE]
STACK = [f"decoder/layers/{name}" for name in DENSE]
EXPERTS = [name.replace("mlp", "MoeBlock_0") for name in STACK]
EXPERTS = [n if "attention" in n else n.removesuffix("/kernel") for n in EXPERTS]
HEAD = ["decoder/logits_dense/kernel"]
MIXTRAL = dict(decoder_block="mixtral", scan_layers=True, sparse_matmul=False)
MIXTRAL |= dict(num_experts=4, num_experts_per_tok=2, base_moe_mlp_dim=96)
QWEN3 = MIXTRAL | dict(decoder_block="qwen3_moe", use_qk_norm=True)
OF_QWEN3 = [name.replace("MoeBlock_0", "moe_block") for name in EXPERTS]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"scan_layers": False}, LAYERS + HEAD),
        ({"scan_layers": True, "remat_policy": "full"}, STACK + HEAD),
        (MIXTRAL, EXPERTS + HEAD),
        (QWEN3, OF_QWEN3 + HEAD),
        # `jax.lax.ragged_dot` in a `shard_map`
        (MIXTRAL | {"sparse_matmul": True, "megablox": False}, EXPERTS + HEAD),
    ],
    ids=["layers", "scanned", "experts", "Qwen3-MoE", "ragged experts"],
)
def test_wrapped_transformer_equals_the_one_on_merged_weights(settings, names):
    model = make_model(**settings)
    targets, exclude = [r".*/kernel"], []
    if "num_experts" in settings:
        targets, exclude = [*targets, r".*/(wi_0|wi_1|wo)"], r".*/gate/kernel"
    config = ql.QLoRAConfig(rank=4, alpha=8, targets=targets, exclude=exclude)
    wrapped = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1))
    assert wrapped.decoder.logits_dense.kernel_lora.a.shape == (64, 4)
    assert_equals_merged(wrapped, model, logits, names)


def test_layers_on_another_axis_are_refused_by_name():
    model = make_model(scan_layers=True, param_scan_axis=1)
    with pytest.raises(ValueError, match="layers/mlp/wo/kernel: .*param_scan_axis=0"):
        ql.nnx.wrap(model, CONFIG, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_wrapped_linen_transformer_equals_the_one_on_merged_weights(scan_layers):
    model = make_linen(scan_layers=scan_layers)
    call = TOKENS, POSITIONS
    params = model.init(jax.random.key(0), *call, enable_dropout=False)["params"]
    params = nn.unbox(params)
    base, lora = ql.linen.init(
        jax.random.key(1), model, params, CONFIG, *call, enable_dropout=False
    )
    names = STACK if scan_layers else LAYERS
    assert set(leaves_by_path(lora)) == {*names, *HEAD}
    lora = randomized(lora)
    wrapped = ql.linen.wrap(model)

    def packed(lora):
        variables = {"params": base, "lora": lora}
        return wrapped.apply(variables, *call, enable_dropout=False)

    def merged(lora):
        variables = {"params": ql.merge(base, lora)}
        return model.apply(variables, *call, enable_dropout=False)

    def loss(run):
        return lambda lora: jnp.sum(jnp.square(run(lora)))

    assert_close(jax.jit(packed)(lora), jax.jit(merged)(lora))
    grads = jax.jit(jax.grad(loss(packed)))(lora)
    assert_close(grads, jax.jit(jax.grad(loss(merged)))(lora))
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("bridge", [nnx.bridge.ToNNX, nnx_wrappers.ToNNX])
def test_nested_bridges(bridge):
    linen = make_linen(scan_layers=False, base_num_decoder_layers=1)
    model = bridge(linen, rngs=nnx.Rngs(0))
    model.lazy_init(TOKENS, POSITIONS, enable_dropout=False)
    wrapped = ql.nnx.wrap(model, CONFIG, rngs=nnx.Rngs(1))
    names = [name for name in LAYERS if "layers_0" in name]
    assert_equals_merged(wrapped, model, logits, names + HEAD)
