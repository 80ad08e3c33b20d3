"""Layers in groups compute the same as layers in one stack, from the same files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, trees_of
from jax.sharding import AbstractMesh
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import data, train
from qlora_jax.llm.models.checkpoint import abstract_params
from qlora_jax.llm.models.config import DecoderConfig, LayerKind, Rope
from qlora_jax.llm.models.decoder import Decoder, grow_cache, init_cache
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.groups import layer_stacks, split_into_periods
from qlora_jax.llm.models.sharding import place_arguments
from qlora_jax.llm.models.tiny import random_params

ROPES = Rope(1e2), Rope(1e4)
KINDS = tuple(LayerKind(ROPES[i == 3], window=(4, None)[i < 2]) for i in range(5))
ONE_STACK = DecoderConfig(64, 32, 48, 5, num_heads=4, num_kv_heads=2, layers=KINDS)
# The same decoder. A width of its own makes the structure of a layer another one, even
# if the width is that of the decoder.
WIDTHS = 48, None, 48, None, 48
GROUPED = DecoderConfig(
    *(64, 32, 48, 5, 4, 2),
    layers=tuple(
        LayerKind(kind.rope, kind.window, width)
        for kind, width in zip(KINDS, WIDTHS, strict=True)
    ),
)
PATHS = {
    "layers_0/layer_0": [0, 2],
    "layers_0/layer_1": [1, 3],
    "layers_1": [4],
}
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 16)).astype(np.int32)


def regroup(tree):
    """Returns a tree of `ONE_STACK` with the paths of `GROUPED`."""
    stack = tree["layers"]
    regrouped = {name: x for name, x in tree.items() if name != "layers"}
    for path, layers in PATHS.items():
        parts = jax.tree.map(lambda x, layers=layers: x[np.array(layers)], stack)
        group, _, position = path.partition("/")
        if position:
            regrouped.setdefault(group, {})[position] = parts
        else:
            regrouped[group] = parts
    return regrouped


def wrap(config, **settings):
    return ql.linen.wrap(Decoder(config, **settings), scanned=Decoder.scanned)


@pytest.fixture(scope="module")
def trees():
    """The packed base of `ONE_STACK`, and its adapters."""
    params = random_params(ONE_STACK)
    return trees_of(params, rank=2, block_size=16, targets="layers/.*_proj/kernel")


def test_layers_are_divided_into_the_fewest_stacks():
    assert split_into_periods("a" * 9) == [(1, 9)]
    assert split_into_periods("aaab" * 3) == [(4, 3)]
    assert split_into_periods("b" + "aab" * 2 + "aa") == [(3, 3)]
    assert split_into_periods("babaab") == [(2, 2), (2, 1)]
    assert split_into_periods("abcc") == [(2, 1), (1, 2)]
    # "a" and three times "aab" would have fewer, but "a" could then repeat more often.
    assert split_into_periods("aaabaabaab") == [(1, 3), (3, 2), (1, 1)]
    stacks = {stack.path: [*stack.layers] for stack in layer_stacks(GROUPED)}
    assert stacks == PATHS


def test_groups_are_read_from_the_tensors_of_one_stack(tmp_path):
    params, raw = random_params(ONE_STACK), {"model_type": "llama"}
    ql.io.save_merged(tmp_path, params, {}, decoder_names(ONE_STACK), raw)
    tensors = ql.io.open_safetensors(tmp_path)
    loaded = ql.io.load(tensors, decoder_names(GROUPED), abstract_params(GROUPED))
    assert_same(loaded, regroup(params))


@pytest.mark.slow
def test_groups_compute_the_loss_and_gradients_of_one_stack(trees):
    rows = [data.Row(x, x, "") for x in (TOKENS[0, :9], TOKENS[1])]
    [batch] = data.eval_batches(rows, batch_size=2, max_length=16)

    def loss_and_gradients(config, base, lora):
        loss = train.decoder_loss(wrap(config, remat=True))

        def total(lora):
            return loss(lora, base, batch, None)[0]

        return jax.jit(jax.value_and_grad(total))(lora)

    base, lora = trees
    loss, gradients = loss_and_gradients(ONE_STACK, base, lora)
    grouped = regroup(base), regroup(lora)
    grouped_loss, grouped_gradients = loss_and_gradients(GROUPED, *grouped)
    assert_close(grouped_loss, loss)
    assert_close(grouped_gradients, regroup(gradients))


@pytest.mark.newest
def test_groups_decode_with_a_cache_for_each_stack(trees):
    base, lora = trees
    expected = jax.jit(wrap(ONE_STACK).apply)({"params": base, "lora": lora}, TOKENS)
    variables = {"params": regroup(base), "lora": regroup(lora)}
    cache, logits = init_cache(GROUPED, 2, 8), []
    assert {*cache} == {*PATHS}
    for start in range(0, 16, 8):
        positions = jnp.broadcast_to(start + jnp.arange(8)[None], (2, 8))
        part, cache = jax.jit(wrap(GROUPED).apply)(
            variables, TOKENS[:, start : start + 8], positions=positions, cache=cache
        )
        cache = grow_cache(cache, 16)
        logits.append(part)
    assert_close(jnp.concatenate(logits, axis=1), expected)


def test_a_mesh_splits_groups_like_one_stack():
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"))

    def specs_of(config):
        return place_arguments(config, abstract_params(config), mesh)["rules"]

    expected, specs = specs_of(ONE_STACK), specs_of(GROUPED)
    for path in PATHS:
        prefix = path + "/"
        stack = {k.removeprefix(prefix): x for k, x in specs.items() if prefix in k}
        assert stack == {
            k.removeprefix("layers/"): x
            for k, x in expected.items()
            if k.startswith("layers/")
        }
