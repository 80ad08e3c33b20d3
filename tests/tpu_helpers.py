"""Compiles programs with the TPU compiler on a machine without a TPU.

`libtpu` supports a single process, and JAX in the tests is set to eight CPU devices. So
a test file compiles in a separate process, which runs the file as a script.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qlora_jax as ql
from qlora_jax.llm.models.config import DecoderConfig, LayerKind
from qlora_jax.llm.models.decoder import Decoder

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
LAYERS, WIDTH, INNER, RANK = 6, 256, 2048, 16
ALL_ALIKE = (LayerKind(),)  # a period of one layer


def run_script(*arguments):
    """Runs a script that prints lists in JSON, and returns them."""
    tests = Path(__file__).parent
    folders = tests.parent, tests, tests.parent / "benchmarks"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    command = [sys.executable, *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("[")]
    return [json.loads(line) for line in lines]


def chips_of(chip):
    """Returns four chips of a kind."""
    return np.array(topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices)


def on_one(chip):
    """Returns a function that places shapes on one chip."""
    place = NamedSharding(Mesh(chips_of(chip)[:1], ("x",)), PartitionSpec())
    return lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )


def lower_step(chip, tokens, memory="device", kinds=ALL_ALIKE, **options):
    """Lowers the gradient of a decoder's loss, with the base in a memory of a chip."""
    layers = kinds * (LAYERS // len(kinds))
    sizes = {"num_heads": 4, "num_kv_heads": 2, "layers": layers}
    config = DecoderConfig(512, WIDTH, INNER, LAYERS, **sizes)
    model = Decoder(config, jnp.bfloat16, **options)
    targets = ql.QLoRAConfig(rank=RANK, targets="layers/.*_proj/kernel")

    def make_trees(key):
        params = Decoder(config).init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return ql.init(key, params, targets)

    shapes = jax.eval_shape(make_trees, jax.random.key(0))
    mesh = Mesh(chips_of(chip)[:1], ("x",))
    base, lora = ql.sharding.place(*shapes, mesh, memory=memory)
    model = ql.linen.wrap(model, scanned=model.scanned, backend=f"pallas_tpu_{chip}")

    def loss(lora, base, ids):
        hidden = model.apply(
            {"params": base, "lora": lora}, ids, segment_ids=ids, return_hidden=True
        )
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)))

    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return jax.jit(jax.grad(loss)).lower(lora, base, ids)
