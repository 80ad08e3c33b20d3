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
    """Loads in one process, and writes down its parts and how much it read."""
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
    parts = {"read": np.asarray(read)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        for shard in leaf.addressable_shards:
            index = [
                i.indices(n)[:2] for i, n in zip(shard.index, leaf.shape, strict=True)
            ]
            name = f"{jax.tree_util.keystr(path)} {shard.device.id}"
            parts[f"{name} index"] = np.asarray(index).reshape(-1, 2)
            parts[f"{name} part"] = np.asarray(shard.data)
    np.savez(folder / f"{rank}.npz", **parts)


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
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), port, str(tmp_path), kind],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
    # One process that has the whole file packs it so.
    whole = load(tmp_path / "model", NAMES, like(), CONFIG, progress=False)
    leaves = jax.tree_util.tree_leaves_with_path(whole)
    leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    seen = 0
    for rank in range(2):
        parts = np.load(tmp_path / f"{rank}.npz")
        for key in (key for key in parts if key.endswith(" part")):
            path = key.split(" ")[0]
            index = tuple(slice(*i) for i in parts[key.replace(" part", " index")])
            np.testing.assert_array_equal(parts[key], leaves[path][index])
            seen += 1
        size = sum(x.nbytes for x in stored.values())
        assert parts["read"] < 0.52 * size
    assert seen == 4 * len(leaves)


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4])
