"""Loading in two processes: each reads and holds the parts of its own devices."""

import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qlora_jax as ql
from qlora_jax.io import Names, load, tensors, write_safetensors

L, D, F = 2, 256, 512
NAMES = Names(
    {
        "up/kernel": "layers.{layer}.up.weight",
        "down/kernel": "layers.{layer}.down.weight",
        "head/kernel": "head.weight",
        "norm/scale": "norm.weight",
    }
)
SHAPES = {
    "up": {"kernel": (L, D, F)},
    "down": {"kernel": (L, F, D)},
    "head": {"kernel": (D, F)},
    "norm": {"scale": (D,)},
}
RULES = {  # columns of their weights, rows, and rows of a float kernel
    "up/kernel": P(None, "fsdp", None),
    "down/kernel": P(None, None, "fsdp"),
    "head/kernel": P(None, "fsdp"),
}
CONFIG = ql.QLoRAConfig(targets="(up|down)/kernel")


def like():
    is_shape = lambda x: isinstance(x, tuple)
    struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.tree.map(struct, SHAPES, is_leaf=is_shape)


def work(rank: int, port: int, folder: pathlib.Path, kind: str) -> None:
    """Loads in one process, and prints what it read and how many parts are right."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    read = 0
    read_into = tensors.File.read_into

    def counted(self, buffer, start):
        nonlocal read
        read += len(buffer)
        read_into(self, buffer, start)

    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(getattr(AxisType, kind),))
    place = lambda base: ql.sharding.place(base, {}, mesh, RULES)[0]
    tensors.File.read_into = counted
    base = load(folder / "model", NAMES, like(), CONFIG, place=place, progress=False)
    tensors.File.read_into, parts = read_into, 0
    # One process that has the whole file packs it so.
    whole = load(folder / "model", NAMES, like(), CONFIG, progress=False)
    for x, y in zip(*map(jax.tree.leaves, (base, whole)), strict=True):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(y)[shard.index])
            parts += 1
    print(read, parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_each_process_reads_its_parts(tmp_path, kind):
    rng = np.random.default_rng(0)
    new = lambda *shape: rng.normal(size=shape).astype(np.float32)
    stored = {"head.weight": new(F, D), "norm.weight": new(D)}
    for i in range(L):
        stored[f"layers.{i}.up.weight"] = new(F, D)
        stored[f"layers.{i}.down.weight"] = new(D, F)
    write_safetensors(tmp_path / "model" / "model.safetensors", stored)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__]
    pipe, given = subprocess.PIPE, [port, str(tmp_path), kind]
    processes = [
        subprocess.Popen([*command, str(rank), *given], stdout=pipe, stderr=pipe)
        for rank in range(2)
    ]
    for process in processes:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        read, parts = map(int, out.splitlines()[-1].split())
        assert read < 0.52 * sum(x.nbytes for x in stored.values())
        assert parts == 2 * (2 * 4 + 2)  # of two packed kernels and two float leaves


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4])
