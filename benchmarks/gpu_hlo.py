"""How XLA compiles `ql.matmul` for an H100: kernels, types, memory; needs no GPU.

    pip install . 'jax[cuda13]'          # about 4.5 GB
    python benchmarks/gpu_hlo.py [--rows 512 --rows 4096] [--backend reference]

Compiles `x @ W` and the input gradient `g @ W.T` ahead of time, with 4096 x 14336
weights in nf4 (blocks of 64, double quantization) and x in bfloat16, and reads the
optimized HLO. The *weight's size* is its number of elements. Only instructions before
the product are compared with it, since at 4096 rows a result has that size too.
Columns:

* gemm: "as compiled" is XLA's choice without a GPU; with one, it times Triton's and the
  vendor's GEMMs. "vendor" forbids Triton's;
* decode: fusions before the product with an input or a result of the weight's size;
* writes: element types of their results;
* f32 weight: whether a float32 buffer of the weight's size exists before the product;
* gather: elements of the largest gather of the module, inside fusions too;
* scale kernels: the other kernels before the product;
* product, result: the kernel that multiplies, and the type it writes;
* after: kernels after the product, with the types that they write;
* temporary: MB that the compiler allocates besides arguments and results. It may put
  intermediates in the result's memory; those are not counted.

Ends with an error unless one bfloat16 fusion decodes, without such a buffer or gather.
Nothing is executed: the output shows which kernels there are, not how long they take.
"""

import argparse
import importlib.metadata
import math
import os
import re

# Set before JAX starts: look for the CUDA plugin, and let it load without a driver.
os.environ["JAX_PLATFORMS"] = ""
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qlora_jax as ql

K, N, BLOCK = 4096, 14336, 64
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# From the output of deviceQuery on a T4. The bandwidth is 5,001 MHz x 2 x 256 bits.
T4 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 65536 threads_per_core_limit: 1024 core_count: 40
  fpus_per_core: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 320064000000 l2_cache_size: 4194304
  clock_rate_ghz: 1.59 device_memory_size: 15843721216
  shared_memory_per_block_optin: 65536
  cuda_compute_capability { major: 7 minor: 5 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "Tesla T4"
"""
GPUS = {"h100": H100, "t4": T4}
GEMMS = {"as compiled": True, "vendor": False}  # whether Triton GEMMs are allowed
NOT_KERNELS = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.+?) ([a-z][\w-]*)\(([^)]*)\)(.*)$")
PRODUCT = re.compile(r"__triton\w*gemm\w*|__cublas[\w$]*|__cudnn[\w$]*")


def cases(m, backend):
    """Yields a name, a function and its arguments for each direction."""

    def shape_struct(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16)

    q = jax.eval_shape(
        lambda w: ql.quantize(w, "nf4", block_size=BLOCK), shape_struct(K, N)
    )

    def product(x, q):
        return ql.matmul(x, q, backend=backend)

    def input_gradient(x, q, g):
        return jax.vjp(lambda x: product(x, q), x)[1](g)[0]

    yield "x @ W", product, (shape_struct(m, K), q)
    yield "g @ W.T", input_gradient, (shape_struct(m, K), q, shape_struct(m, N))


def first_array(text):
    """Returns the element type and the size of the first array type in `text`."""
    dtype, dims = re.search(r"(\w+)\[([\d,]*)\]", text).groups()
    return dtype, math.prod(int(d) for d in dims.split(",") if d)


def read_entry(hlo):
    """Returns `name -> (type, size, opcode, operands, attributes)` of the entry."""
    instructions = {}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        if match := INSTRUCTION.match(line):
            name, kind, opcode, operands, attributes = match.groups()
            operands = re.findall(r"%([\w.-]+)", operands)
            instructions[name] = (*first_array(kind), opcode, operands, attributes)
    return instructions


def ancestors(entry, name):
    """Returns the names that `name` is computed from."""
    reached, todo = set(), list(entry[name][3])
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += entry[name][3]
    return reached


def examine(compiled):
    """Returns a row's cells, and whether decoding is one bfloat16 fusion."""
    hlo = compiled.as_text()
    entry = read_entry(hlo)
    kernels = [name for name in entry if entry[name][2] not in NOT_KERNELS]
    (product,) = [name for name in kernels if PRODUCT.search(entry[name][4])]
    before = ancestors(entry, product)

    def is_weight_sized(name):
        return entry[name][1] == K * N

    decode, scales = [], []
    for name in kernels:
        if name in before:
            weight_sized = is_weight_sized(name) or any(
                map(is_weight_sized, entry[name][3])
            )
            (decode if weight_sized else scales).append(name)
    after = [name for name in kernels if name not in {product, *decode, *scales}]
    copied = any(is_weight_sized(name) and entry[name][0] == "f32" for name in before)
    gathers = re.findall(r" = (\S+) gather\(", hlo)
    gather = max((first_array(text)[1] for text in gathers), default=0)
    writes = [entry[name][0] for name in decode]
    memory = compiled.memory_analysis()
    row = [
        len(decode),
        " ".join(writes),
        "yes" if copied else "no",
        f"{gather:,}",
        len(scales),
        PRODUCT.search(entry[product][4]).group(),
        entry[product][0],
        " ".join(entry[name][0] for name in after) or "none",
        f"{memory.temp_size_in_bytes / 1e6:.1f}",
    ]
    return row, writes == ["bf16"] and not copied and gather < K * N


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", action="append", type=int)
    help = "one that multiplies once: not tiled (default: matmul's own choice)"
    parser.add_argument("--backend", help=help)
    args = parser.parse_args()
    topology = {"target_config": H100, "topology": "1x1x1"}
    devices = topologies.get_topology_desc("", "cuda", **topology).devices
    sharding = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    installed = {
        d.metadata["Name"]: d.version for d in importlib.metadata.distributions()
    }
    relevant = [
        package
        for package in sorted(installed)
        if re.match(r"jax(lib|-cuda|$)|nvidia-cublas", package)
    ]
    print(*[f"{package} {installed[package]}" for package in relevant], sep=", ")
    print(f"{K} x {N}, bfloat16, nf4 in blocks of {BLOCK}, double quantization, H100\n")
    heads = ["M", "direction", "gemm", "decode", "writes", "f32 weight", "gather"]
    heads += ["scale kernels", "product", "result", "after", "temporary"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    all_fit = True
    for m in args.rows or (512, 4096):
        for name, function, arguments in cases(m, args.backend):
            lowered = jax.jit(function, in_shardings=sharding).lower(*arguments)
            for gemm, triton in GEMMS.items():
                options = {"xla_gpu_enable_triton_gemm": triton}
                row, fits = examine(lowered.compile(compiler_options=options))
                all_fit &= fits
                cells = [m, name, gemm, *row]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if not all_fit:
        raise SystemExit("Decoding is not one fusion that writes bfloat16.")


if __name__ == "__main__":
    main()
