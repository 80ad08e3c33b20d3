"""The TPU kernel's static schedule against a dense bfloat16 kernel's; needs no TPU.

    pip install 'jax[tpu]'
    python benchmarks/tpu_static.py [--chip v5e --chip v6e] [--rows 16 --rows 4096]
    python benchmarks/tpu_static.py --rows 16 --fmt nf4 --fmt int4_f16 --fmt mxfp4
    python benchmarks/tpu_static.py --step [--chip v5e] [--rows 512 --rows 2048]
    python benchmarks/tpu_static.py --step --offload
    python benchmarks/tpu_static.py --step --long [--rows 8192] [--model 70B]

The real TPU compiler writes, for each kernel, the bundles of its straight-line code; a
bundle issues in a cycle. A loop's body is counted once. The branches in the list of
bundles give the size of a loop's body, which the table multiplies, and of the code that
only the first step runs, which is counted once per call. Columns:

* step: bundles of one grid step as the compiler wrote it, loops counted once;
* tile: bundles that decode (and, with few rows, multiply) 512 x 512 weights, from the
  difference of two compilations with other steps along the contracted axis;
* call: bundles that all grid steps run, in thousands;
* issue, mxu, hbm: microseconds for each alone: the bundles; the multiplications at the
  matrix unit's peak, with the decoding that cannot overlap them; and the bytes moved;
* time: the longest of these;
* call/dense, time/dense: relative to the dense tiling of fewest bundles, of least time.

`--step` compiles a whole training step of an 8B Llama (`tpu_step.py`) and prints its
memory on one chip for each way to multiply packed kernels; rows are tokens. HBM and
host memory are from XLA's buffer assignment, since XLA's peak also counts host memory.
`--offload` compares the fastest way with the same step whose optimizer state is in host
memory (`ql.optim.offload`). `--long` adds the options for long contexts (`CHOICES` of
`tpu_step.py`) one after another, and marks steps that do not fit.

Nothing is executed: docs/development/kernels.md explains what a schedule does not show.
"""

import argparse
import dataclasses
import glob
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time

ROWS, COLS, BLOCK = 4096, 14336, 64
# topology, form, VMEM for blocks (MiB), GHz (inferred from the peak), multiplications
# per cycle, HBM bytes per microsecond
CHIPS = {
    "v5e": ("v5e:2x2", "sublane", 96, 1.5, 65536, 819e3),
    "v6e": ("v6e:2x2", "shuffle", 96, 1.75, 262144, 1640e3),
}
DENSE = {
    True: ((512, 16), (1024, 16), (256, 16)),
    False: ((1024, 1024), (512, 1024), (256, 1024), (512, 512), (512, 256)),
}


def dense_call(m, transpose, tile, tile_m):
    """A dense Pallas kernel over a full contracted axis, and its arguments."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    contracted, outputs = (COLS, ROWS) if transpose else (ROWS, COLS)
    dims = (((1,), (1 if transpose else 0,)), ((), ()))

    def body(x, w, out):
        product = lax.dot_general(
            x[...], w[...], dims, preferred_element_type=jnp.float32
        )
        out[...] = product.astype(out.dtype)

    block = (tile, contracted) if transpose else (contracted, tile)
    weights = pl.BlockSpec(block, lambda j, i: (j, 0) if transpose else (0, j))
    call = pl.pallas_call(
        body,
        grid=(outputs // tile, m // tile_m),
        in_specs=[pl.BlockSpec((tile_m, contracted), lambda j, i: (i, 0)), weights],
        out_specs=pl.BlockSpec((tile_m, tile), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, outputs), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=120 * 2**20),
    )
    shapes = [(m, contracted), (ROWS, COLS)]
    return call, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def product_spec(transpose, fmt="nf4"):
    """Returns the product spec that all cases here use."""
    from qlora_jax.product.spec import ProductSpec
    from qlora_jax.quant.formats import Packing

    output = "x" if transpose else "y"
    return ProductSpec(Packing(fmt), "bfloat16", ROWS, output=output)


def packed_plan(m, transpose, form, vmem_mib, chunk=None, fmt="nf4"):
    """Returns the plan of `product`, or the same with another step along K (or N)."""
    import jax.numpy as jnp

    from qlora_jax.product.backends.pallas_tpu.tiling import Chip, plan

    spec = product_spec(transpose, fmt)
    tiling = plan(spec, m, COLS, jnp.dtype(jnp.bfloat16), Chip(form, vmem_mib))
    return dataclasses.replace(tiling, chunk=chunk) if chunk else tiling


def packed_call(plan):
    """The fused kernel, and its arguments."""
    import jax
    import jax.numpy as jnp

    from qlora_jax.product.backends.pallas_tpu import fused

    def call(x, codes, scales):
        layer = jnp.zeros(1, jnp.int32)
        return fused.call(plan, layer, x[None], codes[None, None], scales[None], False)

    args = [
        jax.ShapeDtypeStruct((plan.m, plan.contracted), jnp.bfloat16),
        jax.ShapeDtypeStruct((ROWS // 2, COLS), jnp.uint8),
        jax.ShapeDtypeStruct((ROWS // plan.spec.block_size, COLS), jnp.float32),
    ]
    return call, args


def scan_call(form, vmem_mib, by_index, layers=32):
    """A scan over a stack of layers, by slices of the stack or by a layer index."""
    import jax
    import jax.numpy as jnp

    from qlora_jax.product.backends.pallas_tpu import fused
    from qlora_jax.product.backends.pallas_tpu.tiling import Chip

    chip = Chip(form, vmem_mib)

    def forward_and_backward(x, codes, scales, layer=None):
        y = fused.product(product_spec(False), x, codes, scales, layer, chip=chip)
        return fused.product(
            product_spec(True), y, codes, scales, layer, chip=chip
        ), None

    def call(x, codes, scales):
        if by_index:

            def step(x, layer):
                return forward_and_backward(x, codes, scales[layer], layer)

            return jax.lax.scan(step, x, jnp.arange(layers))[0]
        return jax.lax.scan(
            lambda x, w: forward_and_backward(x, *w), x, (codes, scales)
        )[0]

    args = [
        jax.ShapeDtypeStruct((512, ROWS), jnp.bfloat16),
        jax.ShapeDtypeStruct((layers, ROWS // 2, COLS), jnp.uint8),
        jax.ShapeDtypeStruct((layers, ROWS // BLOCK, COLS), jnp.float32),
    ]
    return call, args


def compile_here(chip, case):
    """Compiles one case in this process; prints seconds, and bytes of memory."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology, form, vmem_mib, *_ = CHIPS[chip]
    kind, donated = case.pop("kind"), ()
    if kind == "dense":
        call, args = dense_call(**case)
    elif kind == "packed":
        call, args = packed_call(packed_plan(form=form, vmem_mib=vmem_mib, **case))
    elif kind == "scan":
        call, args = scan_call(form, vmem_mib, **case)
    else:
        from tpu_step import CHOICES, MODELS, step_call

        config = MODELS[case.pop("model")]
        call, args, donated = step_call(chip=chip, config=config, **case)
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("x",))

    def put(x, memory):
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=memory)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    args = jax.tree.map(lambda x: put(x, "device"), args)
    if kind == "step":
        import qlora_jax as ql

        _, state_on_host, base_on_host = CHOICES[case["choice"]]

        def put_on_host(x):
            return put(x, "pinned_host" if x.ndim else "device")

        if state_on_host:
            args[1] = jax.tree.map(put_on_host, args[1])
        if base_on_host:
            args[2], args[0] = ql.sharding.place(args[2], args[0], mesh, memory="host")
    lowered = jax.jit(call, donate_argnums=donated).lower(*args)
    start = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    result = {"seconds": time.perf_counter() - start}
    names = "argument_size", "temp_size", "peak_memory", "host_temp_size"
    for name in names:
        result[name] = getattr(memory, f"{name}_in_bytes")
    print("RESULT", json.dumps(result))


def in_subprocess(chip, case, *flags, dump=None):
    """Compiles one case in a separate process; returns what it prints."""
    env = {
        **os.environ,
        **({"XLA_FLAGS": f"--xla_dump_to={dump}"} if dump else {}),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(flags),
    }
    run = subprocess.run(
        [sys.executable, __file__, "--one", chip, json.dumps(case)],
        env=env,
        capture_output=True,
        text=True,
    )
    result_lines = [x for x in run.stdout.splitlines() if x.startswith("RESULT ")]
    if not result_lines:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(result_lines[0].removeprefix("RESULT "))


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


def compile_case(chip, **case):
    """Compiles one case in a subprocess; returns the schedule of its largest kernel."""
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true"
        result = in_subprocess(chip, case, *flags)
        pattern = os.path.join(dump, "*final_hlo-static-per-bundle-utilization.txt")
        path = max(glob.glob(pattern), key=count_bundles)
        kernel = re.sub(r"-\d+-final_hlo.*", "", path)
        (listing,) = glob.glob(glob.escape(kernel) + "-*[0-9]-final_bundles.txt")
        with open(listing) as file:
            text = file.read()
        bundles = count_bundles(path)
        return Schedule(bundles, *read_branches(text), text, result["temp_size"])


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


def bytes_by_color(dump):
    """Reads how many bytes XLA's buffers take: color 0 is HBM, 5 pinned host memory."""
    sizes = {}
    pattern = os.path.join(dump, "**", "*memory-usage-report.txt")
    for file in glob.glob(pattern, recursive=True):
        with open(file) as report:
            matches = re.findall(r"color=(\d+)\)\nTotal bytes: (\d+)", report.read())
        for color, size in matches:
            sizes[int(color)] = max(sizes.get(int(color), 0), int(size))
    return sizes


def print_steps(chips, sequences, with_offload, is_long, model):
    """Prints memory of a whole step in GB (1e9 bytes) for each way to multiply."""
    from tpu_step import CHOICES, ROWS

    fastest, choices = list(ROWS)[-1], list(CHOICES)
    rows = [(row, "") for row in ROWS]
    if with_offload or is_long:
        chosen = choices[2:] if is_long else choices[:2]
        rows = [(fastest, choice) for choice in chosen]
    heads = ["chip", "tokens", "", "arguments", "temporaries", "peak", "HBM", "host"]
    heads += ["host temporaries", "compiled in"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for chip, sequence, (row, choice) in itertools.product(chips, sequences, rows):
        case = {"kind": "step", "row": row, "sequence": sequence, "choice": choice}
        case["model"] = model
        with tempfile.TemporaryDirectory() as dump:
            try:
                record = in_subprocess(chip, case, dump=dump)
            except RuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"| {chip} | {sequence} | {choice or row} | does not fit |")
                continue
            colors = bytes_by_color(dump)
        names = "argument_size", "temp_size", "peak_memory"
        sizes = [record[name] for name in names] + [colors[0], colors.get(5, 0)]
        sizes = [f"{size / 1e9:.2f}" for size in (*sizes, record["host_temp_size"])]
        name = choice if is_long else ", ".join(filter(None, (row, choice)))
        cells = [chip, sequence, name, *sizes, f"{record['seconds']:.0f} s"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def count_bundles(path):
    """Counts the rows of numbers in a compiler dump, which has one for each bundle."""
    if "pre-delay" in path:
        return 0
    with open(path) as lines:
        rows = [line.split() for line in lines]
    return sum(len(row) > 5 and all(cell.isdigit() for cell in row) for row in rows)


def measure_dense(chip, m, transpose):
    """Returns the fastest dense row over `DENSE`, and the fewest bundles of any."""
    contracted, outputs = (COLS, ROWS) if transpose else (ROWS, COLS)
    rows = []
    for tile, tile_m in DENSE[m <= 64]:
        tile_m = min(tile_m, m)
        if 4 * contracted * (tile + tile_m) > 90 * 2**20:  # blocks, twice, in VMEM
            continue
        case = {"m": m, "transpose": transpose, "tile": tile, "tile_m": tile_m}
        compiled = compile_case(chip, kind="dense", **case)
        step, steps = compiled.bundles, (outputs // tile, m // tile_m)
        row = {"kernel": "dense", "block": f"{tile_m}x{tile}", "step": step, "tile": ""}
        row["temporary"] = compiled.temporary
        row["call"] = step * steps[0] * steps[1]
        rows.append(estimate(chip, m, transpose, row, steps, 2, 0))
    return min(rows, key=lambda row: row["time"]), min(row["call"] for row in rows)


def measure_packed(chip, m, transpose, fmt):
    """Returns the row of the fused kernel."""
    _, form, vmem_mib, *_ = CHIPS[chip]
    plan = packed_plan(m, transpose, form, vmem_mib, fmt=fmt)
    outputs = ROWS if transpose else COLS
    steps = -(-outputs // plan.tile), -(-m // plan.tile_m)
    case = {"kind": "packed", "m": m, "transpose": transpose, "fmt": fmt}
    compiled = compile_case(chip, **case)
    # Two step sizes that divide the axis, so both loop. They differ by one tile.
    short = min(plan.chunk, 1024)
    bundles = [
        compile_case(chip, **case, chunk=chunk).bundles for chunk in (short, 2 * short)
    ]
    per_column = (bundles[1] - bundles[0]) / short
    repeats = plan.contracted // plan.chunk - 1
    again = repeats * compiled.loops[0] if repeats else 0
    every_step, first = compiled.bundles - compiled.first, compiled.first
    if plan.keep:
        call = steps[0] * (steps[1] * every_step + first + again)
    else:
        call = steps[0] * (every_step + again) + first
    row = {"kernel": f"{fmt}, {form}", "block": f"{plan.tile_m}x{plan.tile}"}
    row |= {
        "step": compiled.bundles,
        "tile": round(per_column * 512 * 512 / plan.tile),
        "call": call,
    }
    row["temporary"] = compiled.temporary
    bytes_a_weight = 0.5 + 4 / plan.spec.block_size  # scales in float32
    alone = steps[0] * per_column * plan.contracted if plan.keep else 0
    return estimate(chip, m, transpose, row, steps, bytes_a_weight, alone)


def estimate(chip, m, transpose, row, steps, bytes_a_weight, alone):
    """Adds the times of a row's counts on the chip, in microseconds.

    `alone` is the bundles of decoding that cannot overlap the matrix unit's work.
    """
    *_, ghz, macs, hbm = CHIPS[chip]
    contracted, outputs = (COLS, ROWS) if transpose else (ROWS, COLS)
    x_reads = steps[0] if steps[1] > 1 else 1
    moved_bytes = ROWS * COLS * bytes_a_weight + 2 * m * (
        x_reads * contracted + outputs
    )
    row |= {"chip": chip, "M": m, "product": "g @ W.T" if transpose else "x @ W"}
    row["issue"] = row["call"] / ghz / 1e3
    row["mxu"] = (m * ROWS * COLS / macs + alone) / ghz / 1e3
    row["hbm"] = moved_bytes / hbm
    row["time"] = max(row["issue"], row["mxu"], row["hbm"])
    return row


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chip", action="append", choices=list(CHIPS))
    parser.add_argument("--rows", action="append", type=int)
    parser.add_argument("--fmt", action="append")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--model", choices=["8B", "70B"], default="8B")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return compile_here(args.one[0], json.loads(args.one[1]))
    if args.step:
        rows = args.rows or ([512] if args.offload else [512, 2048])
        rows = args.rows or [8192] if args.long else rows
        chips = args.chip or ["v5e"]
        return print_steps(chips, rows, args.offload, args.long, args.model)
    fmts = args.fmt or ["nf4"]
    print(f"{ROWS} x {COLS}, bfloat16, formats in their usual blocks; microseconds")
    keys = ["chip", "M", "product", "kernel", "block", "step", "tile", "call"]
    keys += ["issue", "mxu", "hbm", "time", "temporary"]
    heads = [*keys, "call/dense", "time/dense"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for chip in args.chip or CHIPS:
        for m in args.rows or (16, 4096):
            for transpose in (False, True):
                dense, fewest = measure_dense(chip, m, transpose)
                packed = (measure_packed(chip, m, transpose, fmt) for fmt in fmts)
                for row in (dense, *packed):
                    cells = [row[key] for key in keys]
                    cells[7] = f"{row['call'] / 1e3:.0f}"
                    cells[8:12] = [f"{cell:.1f}" for cell in cells[8:12]]
                    cells.append(f"{row['call'] / fewest:.3f}")
                    cells.append(f"{row['time'] / dense['time']:.3f}")
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    for chip in [] if args.fmt else args.chip or CHIPS:
        for by_index in (False, True):
            compiled = compile_case(chip, kind="scan", by_index=by_index)
            layer_access = (
                "stack and layer index" if by_index else "slices of the stack"
            )
            size = f"{compiled.temporary / 1e6:.1f} MB"
            print(f"{chip}, 32 layers in a scan, {layer_access}: {size}")


if __name__ == "__main__":
    main()
