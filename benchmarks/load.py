"""Time and memory to load a float checkpoint as a 4-bit model, on this machine's CPU.

    python benchmarks/load.py [--torch-python PATH] [--rounds 3] [--layers 8]

Makes a Llama-shaped checkpoint in bfloat16 and loads it in three ways, each in a fresh
process: packed while it is read, read in float and then packed, and by transformers
with bitsandbytes. Time and memory are measured from after the imports, and time
includes compiling. The kernels of the decoder's layers are packed in NF4 with double
quantization.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from timing import find_python, machine, mib, table, versions, write_markdown

WAYS = {
    "packed as read": "ours",
    "read in float, then packed": "float_first",
    "transformers + bitsandbytes": "bitsandbytes",
}
SIZES = dict(layers=8, width=2048, inner=5632, heads=32, kv_heads=8, vocab=32_000)
QUICK = dict(layers=2, width=128, inner=256, heads=4, kv_heads=2, vocab=512)
TARGETS = r".*_proj/kernel"


def shapes(s) -> dict[str, tuple[int, int]]:
    """Returns the shapes `[out, in]` of the linear modules of a decoder layer."""
    kv = s["width"] * s["kv_heads"] // s["heads"]
    return {
        "self_attn.q_proj": (s["width"], s["width"]),
        "self_attn.k_proj": (kv, s["width"]),
        "self_attn.v_proj": (kv, s["width"]),
        "self_attn.o_proj": (s["width"], s["width"]),
        "mlp.gate_proj": (s["inner"], s["width"]),
        "mlp.up_proj": (s["inner"], s["width"]),
        "mlp.down_proj": (s["width"], s["inner"]),
    }


NORMS = ("input_layernorm", "post_attention_layernorm")


def make(folder: pathlib.Path, s) -> int:
    """Writes the checkpoint, and returns its bytes."""
    import ml_dtypes
    import numpy as np

    import qlora_jax as ql

    rng = np.random.default_rng(0)

    def draw_weight(*shape):
        x = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        return x.astype(ml_dtypes.bfloat16)

    for i in range(s["layers"]):
        name = f"model.layers.{i}."
        tensors = {
            f"{name}{x}.weight": draw_weight(*size) for x, size in shapes(s).items()
        }
        tensors |= {f"{name}{x}.weight": draw_weight(s["width"]) for x in NORMS}
        file = f"model-{i:05d}-of-{s['layers']:05d}.safetensors"
        if i == 0:
            tensors["model.embed_tokens.weight"] = draw_weight(s["vocab"], s["width"])
            tensors["lm_head.weight"] = draw_weight(s["vocab"], s["width"])
            tensors["model.norm.weight"] = draw_weight(s["width"])
        ql.io.write_safetensors(folder / file, tensors, metadata={"format": "pt"})
    files = sorted(folder.glob("*.safetensors"))
    weight_map = {
        name: file.name for file in files for name in ql.io.open_safetensors(file)
    }
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": s["vocab"],
        "hidden_size": s["width"],
        "intermediate_size": s["inner"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv_heads"],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in files)


def ours(folder, s, float_first=False):
    """Returns a function that loads the folder with this library."""
    import jax
    import jax.numpy as jnp

    import qlora_jax as ql

    names, like = {}, {}

    def add(path, name, *shape):
        names[path] = name
        *parents, leaf = path.split("/")
        node = like
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    for x, (n, k) in shapes(s).items():
        path = f"layers/{x.replace('.', '/')}/kernel"
        add(path, f"model.layers.{{layer}}.{x}.weight", s["layers"], k, n)
    for x in NORMS:
        path, name = f"layers/{x}/scale", f"model.layers.{{layer}}.{x}.weight"
        add(path, name, s["layers"], s["width"])
    add("embed/embedding", "model.embed_tokens.weight", s["vocab"], s["width"])
    add("head/kernel", "lm_head.weight", s["width"], s["vocab"])
    add("norm/scale", "model.norm.weight", s["width"])
    table, config = ql.io.Names(names), ql.QLoRAConfig(targets=TARGETS)

    def load():
        if not float_first:
            return ql.io.load(folder, table, like, config, progress=False)
        params = ql.io.load(folder, table, like, progress=False)
        return ql.quantize(params, config, donate=True)

    return lambda: jax.block_until_ready(load())


def float_first(folder, s):
    return ours(folder, s, float_first=True)


def bitsandbytes(folder, s):
    """Returns a function that loads the folder in transformers."""
    del s
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16
    )


def status(key: str) -> int:
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024


def work(way: str, folder: str, s: dict) -> None:
    """Loads once; prints seconds, peak bytes, and peak bytes beyond the imports."""
    load = globals()[way](folder, s)
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    peak = status("VmHWM")
    del model
    print(json.dumps([seconds, peak, peak - before]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-python", help="a Python that has bitsandbytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SIZES["layers"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--markdown", help="file to write the report to")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = QUICK if args.quick else {**SIZES, "layers": args.layers}
    if args.work:
        return work(*args.work, sizes)
    settings = ["--layers", str(args.layers)] + ["--quick"] * args.quick
    pythons = {way: sys.executable for way in WAYS}
    pythons["transformers + bitsandbytes"] = find_python(
        args.torch_python, "bitsandbytes"
    )
    samples_of_way = {way: [] for way, python in pythons.items() if python}
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as folder:
        size = make(pathlib.Path(folder), sizes)
        for _ in tqdm(range(args.rounds)):
            for way in samples_of_way:
                command = [pythons[way], __file__, "--work", WAYS[way], folder]
                done = subprocess.run(
                    command + settings,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                samples_of_way[way].append(json.loads(done.stdout.splitlines()[-1]))
    first = statistics.median(x[0] for x in samples_of_way["packed as read"])
    rows = []
    for way, samples in samples_of_way.items():
        seconds, peak, growth = map(statistics.median, zip(*samples, strict=True))
        rows.append(
            [way, f"{seconds / first:.2f}", f"{seconds:.1f}", mib(peak), mib(growth)]
        )
    header = ["way", "time, ratio", "s", "process peak MiB", "beyond imports MiB"]
    version_list = ", ".join(
        f"{name} {version}" for name, version in versions().items()
    )
    text = f"{machine()}\n{version_list}\nCheckpoint: {mib(size)} MiB in bfloat16\n\n"
    text += table(header, rows)
    for way in pythons.keys() - samples_of_way.keys():
        text += f"\nNot measured, since no Python has it: {way}"
    print(text)
    write_markdown(args.markdown, text)


if __name__ == "__main__":
    main()
