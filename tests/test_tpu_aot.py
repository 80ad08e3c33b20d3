"""The TPU kernel through the real TPU compiler, on a machine that has no TPU.

Each chip's cases compile in a subprocess of their own (this file, run as a script):
`libtpu` serves one process, and the tests' JAX is set to eight CPU devices.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOPOLOGIES = {
    "v5e": ("v5e:2x2", "sublane"),
    "v5p": ("v5p:2x2x1", "sublane"),
    "v6e": ("v6e:2x2", "shuffle"),
    "tpu7x": ("tpu7x:2x2x1", "shuffle"),
}

# name: rows of x, weight rows, weight columns, format, block size, dtype, form (None:
# the chip's), axes before the weight's, whether a layer is picked
CASES = {
    "few rows": (16, 4096, 512, "nf4", 64, "bfloat16", None, (), False),
    "many rows": (300, 1024, 1536, "nf4", 64, "bfloat16", None, (), False),
    "float32": (40, 512, 640, "nf4", 64, "float32", None, (), False),
    "blocks of 32": (16, 640, 384, "fp4", 32, "bfloat16", None, (), False),
    "blocks of 256": (70, 2304, 384, "int4", 256, "bfloat16", None, (), False),
    "int8": (70, 512, 384, "int8", 64, "bfloat16", None, (), False),
    "select": (16, 512, 384, "nf4", 64, "bfloat16", "select", (), False),
    "odd sizes": (5, 320, 200, "nf4", 64, "bfloat16", None, (), False),
    "small": (3, 96, 72, "nf4", 32, "float32", None, (), False),
    "layer of a stack": (16, 512, 384, "nf4", 64, "bfloat16", None, (4,), True),
    "experts": (16, 512, 384, "nf4", 64, "bfloat16", None, (3,), False),
    "stacked experts": (70, 512, 384, "nf4", 64, "bfloat16", None, (2, 3), True),
}
# Where what is contracted is not a multiple of 128, it is padded: that takes memory.
PADDED = {("odd sizes", False), ("odd sizes", True), ("small", False), ("small", True)}


def compile_cases(chip):
    """Compiles every case for one chip; yields its name and temporary bytes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from qlora_jax.matmul import pallas_tpu

    topology, own = TOPOLOGIES[chip]
    devices = topologies.get_topology_desc(topology, "tpu").devices
    place = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())

    def shape(*dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    for name, case in CASES.items():
        m, rows, cols, fmt, block_size, dtype, form, lead, pick = case
        batch = lead[1:] if pick else lead
        codes_rows = rows if fmt == "int8" else rows // 2
        for transpose in (False, True):
            settings = {
                "fmt": fmt,
                "block_size": block_size,
                "transpose": transpose,
                "decode": form or own,
            }
            product = functools.partial(pallas_tpu.product, **settings)
            lowered = jax.jit(product).lower(
                shape(*batch, m, cols if transpose else rows, dtype=dtype),
                shape(*lead, codes_rows, cols, dtype=jnp.uint8),
                shape(*batch, rows // block_size, cols, dtype=jnp.float32),
                shape(dtype=jnp.int32) if pick else None,
            )
            try:
                memory = lowered.compile().memory_analysis()
                result = memory.temp_size_in_bytes
            except Exception as error:  # shown by the test that reads it
                result = f"{type(error).__name__}: {error}"[:2000]
            yield [name, transpose, result]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_for(chip):
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    run = subprocess.run(
        [sys.executable, __file__, chip], env=env, capture_output=True, text=True
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("[")]
    assert run.returncode == 0, run.stderr[-2000:]
    results = [json.loads(line) for line in lines]
    assert len(results) == 2 * len(CASES)
    for name, transpose, temporary in results:
        assert isinstance(temporary, int), f"{name}, {transpose=}: {temporary}"
        if (name, transpose) not in PADDED:
            assert temporary == 0, f"{name}, {transpose=}"


if __name__ == "__main__":
    for result in compile_cases(sys.argv[1]):
        print(json.dumps(result), flush=True)
