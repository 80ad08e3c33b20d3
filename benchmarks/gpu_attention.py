"""Memory of attention on an H100, as compiled for it without a GPU.

    pip install '.[models]' 'jax[cuda13]'          # about 4.5 GB
    python benchmarks/gpu_attention.py [--tokens 2048 --tokens 8192]

Compiles the forward and the backward pass of one layer's attention ahead of time, as
the decoder computes it with each value of `attention` except "splash", which is for
TPUs. The row of packed sequences is in float16, and has the heads of Llama 3.1 8B: 32
query heads and 8 key heads with 128 values each. Prints the MB of temporary buffers,
which do not include the arguments and results. Nothing is executed, so nothing is
timed.
"""

import argparse
import functools

from gpu_hlo import H100  # first, because it sets variables before JAX starts

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.llm.models.attention import MASKED, attend

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128


def gradients(implementation, query, key, value, positions, segment_ids):
    """Returns the gradients of attention with respect to query, key and value."""
    visible = positions[:, :, None] >= positions[:, None, :]
    visible &= segment_ids[:, :, None] == segment_ids[:, None, :]

    def loss(query, key, value):
        settings = {"scale": HEAD_DIM**-0.5, "implementation": implementation}
        mixed = attend(query, key, value, visible, **settings)
        return jnp.sum(jnp.square(mixed.astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)


def main():
    """Prints a table with a row for each number of tokens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", action="append", type=int)
    args = parser.parse_args()
    topology = {"target_config": H100, "topology": "1x1x1"}
    devices = topologies.get_topology_desc("", "cuda", **topology).devices
    sharding = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    print(f"jax {jax.__version__}\n\n| tokens | " + " | ".join(MASKED) + " |")
    print("|---" * (1 + len(MASKED)) + "|", flush=True)
    for tokens in args.tokens or (2048, 8192):
        cells = []
        for implementation in MASKED:
            shapes = [
                jax.ShapeDtypeStruct((1, tokens, num_heads, HEAD_DIM), jnp.float16)
                for num_heads in (HEADS, KEY_HEADS, KEY_HEADS)
            ]
            shapes += [jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 2
            function = functools.partial(gradients, implementation)
            lowered = jax.jit(function, in_shardings=sharding).lower(*shapes)
            memory = lowered.compile().memory_analysis()
            cells.append(f"{memory.temp_size_in_bytes / 1e6:,.0f}")
        print(f"| {tokens:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
