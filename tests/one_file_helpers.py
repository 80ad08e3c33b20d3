"""Small models that were trained to be merged into one 4-bit file."""

import dataclasses
import functools
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qlora_jax as ql
from qlora_jax.llm.gguf.save import save_gguf
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.tiny import save_tiny

TOKENS = np.random.default_rng(0).integers(3, 256, (2, 24))
VOCAB_SIZE = 259  # that of `save_tiny`
KERNELS = r"layers/.*_proj/kernel"


class Case(NamedTuple):
    """The layout of the file, its number format, and the base of the training."""

    layout: str
    target_fmt: str
    fmt: str | None = None  # the number format of the base
    dtype: str = "float32"  # that kernels are decoded to, in the base and in the file


CASES = {
    "nf4": Case("bitsandbytes", "nf4"),
    "nf4 from nf4": Case("bitsandbytes", "nf4", fmt="nf4"),
    "nf4 from bfloat16": Case("bitsandbytes", "nf4", dtype="bfloat16"),
    "fp4 from int8": Case("bitsandbytes", "fp4", fmt="int8"),
    "int4": Case("compressed-tensors", "int4_f16"),
    "int4 for AWQ": Case("awq", "int4_f16"),
    # compressed-tensors decodes these two to bfloat16.
    "mxfp4": Case("compressed-tensors", "mxfp4", dtype="bfloat16"),
    "nvfp4": Case("compressed-tensors", "nvfp4", dtype="bfloat16"),
    "q4_0": Case("gguf", "q4_0"),
}


def mean_loss(logits, tokens=TOKENS):
    """Returns the mean loss of the tokens after the first, from logits of any kind."""
    log_probs = jax.nn.log_softmax(np.asarray(logits)[:, :-1])
    targets = np.asarray(tokens)[:, 1:, None]
    return -np.take_along_axis(np.asarray(log_probs), targets, -1).mean()


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A base and a trained merge-aware adapter.

    Attributes:
        folder: The float model.
        loss: The loss of the trained adapter, as the training step computes it.
    """

    case: Case
    folder: pathlib.Path
    config: Any
    qlora: ql.QLoRAConfig
    base: Any
    lora: Any
    loss: float

    def logits(self, base, lora=None, tokens=TOKENS):
        """Returns the logits of the forward pass."""
        return _logits(self.config, base, lora or {}, jnp.asarray(tokens))

    @property
    def ordinary(self):
        """The trained factors in ordinary adapters, which are not packed."""

        def as_lora(x):
            return ql.LoRA(x.a, x.b, x.scaling, 0.0, x.geometry)

        def is_adapter(x):
            return isinstance(x, ql.MergeAware)

        return jax.tree.map(as_lora, self.lora, is_leaf=is_adapter)

    def save(self, out):
        """Merges the adapter into its format, and writes a folder, or a GGUF file."""
        merged = ql.merge(self.base, self.lora, requantize=True)
        args = out, merged, decoder_names(self.config), self.folder
        if self.case.layout == "gguf":
            out = out.with_suffix(".gguf")
            save_gguf(out, self.folder, merged, fmt="Q4_0", progress=False)
        elif self.case.layout == "bitsandbytes":
            ql.io.save_bitsandbytes(*args, progress=False)
        else:
            ql.io.save_packed(*args, self.case.layout, progress=False)
        return out


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, base, lora, tokens):
    variables = {"params": base, "lora": lora}
    return ql.linen.wrap(Decoder(config)).apply(variables, tokens)


def save_model(folder):
    """Saves a random model whose weights are exact in float16.

    mlx-lm reads the embedding and the norms of AWQ's folders in float16.
    """
    save_tiny(folder, hidden_size=128, intermediate_size=256)
    path, tensors = folder / "model.safetensors", {}
    for name, x in ql.io.open_safetensors(path).items():
        tensors[name] = np.asarray(x).astype(np.float16).astype(np.float32)
    ql.io.write_safetensors(path, tensors)


def train(folder, case):
    """Trains all linear layers for three steps, in float32, which lowers the loss."""
    if not folder.exists():
        save_model(folder)
    config, params = load(folder, progress=False)
    settings = {"rank": 4, "alpha": 8, "targets": KERNELS, "merge_aware": True}
    qlora = ql.QLoRAConfig(fmt=case.fmt, target_fmt=case.target_fmt, **settings)

    def cast(path, x):
        # Norms, embeddings and activations stay in float32.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return x.astype(case.dtype) if re.fullmatch(KERNELS, name) else x

    params = jax.tree.map_with_path(cast, params)
    base, lora = ql.init(jax.random.key(0), params, qlora)
    optimizer = optax.adam(2e-2)

    @jax.jit
    def step(lora, base, state):
        def loss(lora):
            logits = _logits(config, base, lora, TOKENS)[:, :-1]
            softmax_loss = optax.softmax_cross_entropy_with_integer_labels
            return softmax_loss(logits, TOKENS[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss)(lora)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(lora, updates), state, loss

    state, trained, losses = optimizer.init(lora), lora, []
    for _ in range(4):
        lora = trained
        trained, state, loss = step(lora, base, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1, losses
    return TrainedModel(case, folder, config, qlora, base, lora, losses[-1])
