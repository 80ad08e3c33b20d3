"""A decoder in float16, whose largest number is 65504, beside one in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tolerances import relative_error

import qlora_jax as ql
from qlora_jax.llm import data, train
from qlora_jax.llm.models.config import DecoderConfig, DeltaRule, LayerKind
from qlora_jax.llm.models.decoder import Decoder, head_arguments

LINEAR = LayerKind(None, delta_rule=DeltaRule(2, 4, key_dim=8, value_dim=6))
CONFIG = DecoderConfig(64, 32, 48, 2, 4, 2, layers=(LINEAR, LayerKind()), qk_norms=True)
TOKENS = jax.random.randint(jax.random.key(0), (4, 16), 0, 64)
OPTIMIZER = optax.adam(0.02)


def init_params():
    return jax.jit(Decoder(CONFIG).init)(jax.random.key(1), TOKENS)["params"]


def test_large_values_do_not_overflow():
    """Norms, the delta rule and scores square values or sum products: in float32."""

    def enlarge(path, x):
        name = jax.tree_util.keystr(path)
        if "embed_tokens" in name:
            return 1e4 * x  # the squares of the residual stream overflow in float16
        is_large = any(part in name for part in ("q_proj", "k_proj", "in_proj_qkv"))
        return 400 * x if is_large and "kernel" in name else x

    params = jax.tree.map_with_path(enlarge, init_params())

    def compute(dtype):
        model = Decoder(CONFIG, dtype)
        hidden = jax.jit(lambda x: model.apply(x, TOKENS, return_hidden=True))
        states = hidden({"params": params})
        logits = jax.jit(model.apply)({"params": params}, TOKENS)
        head = head_arguments(CONFIG, params)  # the embedding, so that logits are large
        return logits, ql.losses.chunked_cross_entropy(states, labels=TOKENS, **head)

    for got, want in zip(compute(jnp.float16), compute(jnp.float32), strict=True):
        assert got.dtype == jnp.float32
        assert relative_error(got, want) < 5e-3


def test_training_has_nearly_the_losses_of_float32():
    params, tokens = init_params(), np.asarray(TOKENS)
    config = ql.QLoRAConfig(
        rank=4, block_size=16, targets="layers.*/.*(?<!out)_proj/kernel"
    )
    base, lora = ql.linen.init(
        jax.random.key(2), Decoder(CONFIG), params, config, TOKENS
    )
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    weights = np.ones(tokens.shape, np.float32)
    targets = np.roll(tokens, -1, 1)
    batch = data.Batch(tokens, tokens * 0 + 1, positions, positions, targets, weights)

    def run(dtype, loss_scale):
        """Returns the losses of 25 updates, and the number of skipped steps."""
        model = ql.linen.wrap(Decoder(CONFIG, dtype), scanned=Decoder.scanned)
        step = train.make_step(train.decoder_loss(model), OPTIMIZER)
        lora_copy = jax.tree.map(jnp.copy, lora)  # the state is donated
        state, losses = train.State.create(lora_copy, OPTIMIZER, 0, loss_scale), []
        while len(losses) < 25:
            state, report = step(state, base, [batch])
            losses += [float(report.loss)] * bool(report.is_finite)
        return losses, int(state.skipped)

    # Too large at first, so that some steps are skipped.
    loss_scale = train.LossScale.create()._replace(scale=jnp.float32(2**28))
    got, skipped = run(jnp.float16, loss_scale)
    want, _ = run(jnp.float32, None)
    assert skipped > 2
    assert want[-1] < want[0] / 2
    assert relative_error(got, want) < 0.02
