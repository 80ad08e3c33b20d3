"""Loading in two processes: each reads and holds the parts of its own devices."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from test_load import NAMES, RULES, like, load, make, packed, write

import qlora_jax as ql
from qlora_jax.io import tensors


def work(rank: int, port: int, folder: pathlib.Path, kind: str) -> None:
    """Loads in a process, compares its parts, and prints how many bytes it read."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    read = 0
    read_into = tensors.File.read_into

    def count_and_read(self, buffer, start):
        nonlocal read
        read += len(buffer)
        read_into(self, buffer, start)

    kinds = (AxisType[kind],) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=kinds)

    def place(base):
        return ql.sharding.place(base, {}, mesh, RULES)[0]

    config, expected = packed(make()[1])
    tensors.File.read_into = count_and_read
    base = load(folder, NAMES, like(), config, place=place)
    for x, y in zip(*map(jax.tree.leaves, (base, expected)), strict=True):
        assert len(x.addressable_shards) == 2
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(y)[shard.index])
    print(read)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_each_process_reads_its_parts(tmp_path, kind):
    write(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        arguments = [str(free.getsockname()[1]), str(tmp_path), kind]
    test_folders = pathlib.Path(__file__).parents
    env = {
        **os.environ,
        "PYTHONPATH": f"{test_folders[2]}{os.pathsep}{test_folders[1]}",
    }
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), *arguments], **settings)
        for rank in range(2)
    ]
    for process in processes:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        size = (tmp_path / "model.safetensors").stat().st_size
        assert int(out.splitlines()[-1]) < 0.52 * size


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4])
