"""The schedule that the real TPU compiler writes for the fused kernel; needs no TPU.

A schedule is a list of bundles, each of which issues in a cycle. A loop's body is
listed once. The module is also the script that compiles, in a separate process, since
`libtpu` supports a single process.
"""

import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile

ROWS, COLS = 4096, 14336
# topology, form of the kernel
CHIPS = {"v5e": ("v5e:2x2", "sublane"), "v6e": ("v6e:2x2", "shuffle")}
VMEM_MIB = 96


def packed_call(form, m, fmt):
    """Returns `x @ W` by the fused kernel, and its arguments."""
    import jax
    import jax.numpy as jnp

    from qlora_jax.product.backends.pallas_tpu import fused
    from qlora_jax.product.backends.pallas_tpu.tiling import Chip, plan
    from qlora_jax.product.spec import ProductSpec
    from qlora_jax.quant.formats import Packing

    dtype = jnp.dtype(jnp.bfloat16)
    spec = ProductSpec(fmt, Packing(fmt).block_size, dtype, ROWS, 0, dtype)
    tiling = plan(spec, m, COLS, dtype, Chip(form, VMEM_MIB))

    def call(x, codes, scales):
        layer = jnp.zeros(1, jnp.int32)
        return fused.call(
            tiling, layer, x[None], codes[None, None], scales[None], False
        )

    args = [
        jax.ShapeDtypeStruct((tiling.m, tiling.contracted), jnp.bfloat16),
        jax.ShapeDtypeStruct((ROWS // 2, COLS), jnp.uint8),
        jax.ShapeDtypeStruct((ROWS // tiling.spec.block_size, COLS), jnp.float32),
    ]
    return call, args


def compile_here(chip, m, fmt):
    """Compiles a product in this process; prints the bytes that it sets aside."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology, form = CHIPS[chip]
    call, args = packed_call(form, m, fmt)
    devices = topologies.get_topology_desc(topology, "tpu").devices
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in args]
    memory = jax.jit(call).lower(*args).compile().memory_analysis()
    assert memory is not None
    print("RESULT", json.dumps(memory.temp_size_in_bytes))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule that the compiler wrote for a kernel.

    Attributes:
        bundles: Bundles of a grid step, loops counted once.
        first: Bundles that only the first step along an axis runs (`pl.when`).
        loops: Bundles of the body of each loop in a step.
        text: All bundles, as the compiler prints them.
        temporary: Bytes that the program sets aside.
    """

    bundles: int
    first: int
    loops: list[int]
    text: str
    temporary: int


def compile_schedule(chip, m, fmt):
    """Returns the schedule of `x @ W` with `m` rows of x and 4096 x 14336 weights."""
    with tempfile.TemporaryDirectory() as dump:
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, __file__, chip, str(m), fmt]
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        result_lines = [x for x in run.stdout.splitlines() if x.startswith("RESULT ")]
        assert result_lines, run.stderr[-2000:]
        temporary = json.loads(result_lines[0].removeprefix("RESULT "))
        pattern = os.path.join(dump, "*final_hlo-static-per-bundle-utilization.txt")
        path = max(glob.glob(pattern), key=count_bundles)
        kernel = re.sub(r"-\d+-final_hlo.*", "", path)
        (listing,) = glob.glob(glob.escape(kernel) + "-*[0-9]-final_bundles.txt")
        with open(listing) as file:
            text = file.read()
        return Schedule(count_bundles(path), *read_branches(text), text, temporary)


def read_branches(text):
    """Reads `Schedule.first` and `Schedule.loops` from a list of bundles."""
    started, forward, first, loops, address = {}, [], 0, [], 0
    for line in text.splitlines():
        if match := re.match(r"\s*0x([0-9a-f]+)\s+(PF)?", line):
            address = int(match[1], 16)
            if match[2] and forward:  # where a branch forward leads
                begin = forward.pop()
                # The outermost branch skips a whole step, while the pipeline starts.
                first += address - begin if len(forward) == 1 else 0
        for region in re.findall(r"Start region (\d+)", line):
            started[region] = address
        if branch := re.search(r"sbr\.rel .* target = \$region(\d+)", line):
            after = address + 5  # a branch, and four delay slots, always run
            if branch[1] in started:
                loops.append(after - started[branch[1]])
            else:
                forward.append(after)
    return first, loops[:-1]  # the last is the grid's


def count_bundles(path):
    """Counts the rows of numbers in a compiler dump, which has one for each bundle."""
    if "pre-delay" in path:
        return 0
    with open(path) as lines:
        rows = [line.split() for line in lines]
    return sum(len(row) > 5 and all(cell.isdigit() for cell in row) for row in rows)


if __name__ == "__main__":
    compile_here(sys.argv[1], int(sys.argv[2]), sys.argv[3])
