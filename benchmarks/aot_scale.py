"""A whole training step of `qlora-jax train`, by the real compilers; needs no device.

    pip install '.[train,tpu]'     # or '.[train]' 'jax[cuda13]'
    python benchmarks/aot_scale.py [--only 70B] [--timeout 3600]
    python benchmarks/aot_scale.py --table

The first environment compiles the rows for TPUs, the second (4.6 GB) those for GPUs.

Each row of `scale_rows.ROWS` is compiled from shapes alone by `app.program.lower_step`:
the decoder, loss, adapters, optimizer and step are those of the command. Each row runs
in a separate process with a time limit. Results are added to `aot_scale.jsonl`, and
rows in that file are only compiled again with `--again`. `--table` writes the tables of
docs/scale from that file.

HBM and host memory are read from XLA's buffer assignment (its memory-usage report:
color 0 is HBM, color 5 pinned host memory). `memory_analysis().peak_memory_in_bytes` is
not used, since it also counts host memory. If a program does not fit, the TPU compiler
reports how much it would use; the GPU compiler compiles it nevertheless.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from hlo_collectives import collectives
from scale_rows import CONFIGS, GPUS, HBM, ROWS, chip_of

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "scale"
RESULTS = pathlib.Path(__file__).with_name("aot_scale.jsonl")


def lower_row(row: dict) -> Any:
    """Lowers the step of a row.

    Args:
        row: `model`, `topology` (such as "v5e:2x2" or "h100:1x1x1"), `chips`, and
            `settings`, those of `TrainConfig`.
    """
    from qlora_jax.llm.app.train_config import TrainConfig
    from qlora_jax.llm.app.training.program import lower_step

    devices, backend = devices_of(row)
    settings = {"model": row["model"], "data": "data", "out": "run", "steps": 1000}
    settings |= {"warmup": 20, **row["settings"]}
    config = TrainConfig.from_settings(settings)
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(row, pathlib.Path(folder))
        return lower_step(config, model, devices[: row["chips"]], backend)


def compile_here(row: dict, lower: Callable[[dict], Any] = lower_row) -> dict:
    """Compiles the program that `lower` returns for a row, in this process.

    Returns:
        Bytes of memory on one chip, collectives, and seconds of processor time; or
        `error`.
    """
    start = time.process_time()
    lowered = lower(row)
    record: dict[str, Any] = {"lower_seconds": round(time.process_time() - start, 1)}
    start = time.process_time()
    try:
        compiled = lowered.compile()
    except Exception as error:  # errors of the compiler are results
        record["error"] = str(error)
    record["compile_seconds"] = round(time.process_time() - start, 1)
    if "error" in record:
        return record
    return record | measure(compiled)


def model_of(row: dict, folder: pathlib.Path) -> Any:
    """Returns the model of a row, an `OpenModel` of shapes.

    With the engine "torch", it is described by a `config.json` in `folder`.
    """
    from qlora_jax.llm.app.open_model import OpenModel, open_model
    from qlora_jax.llm.models.families import config_from_hf
    from qlora_jax.llm.models.jax_engine import JaxEngine

    raw = CONFIGS[row["model"]]
    if row["settings"].get("engine") == "torch":
        (folder / "config.json").write_text(json.dumps(raw), "utf-8")
        return open_model(str(folder), engine="torch")
    engine = JaxEngine(pathlib.Path(row["model"]), config_from_hf(raw))
    return OpenModel(engine, engine.shapes)


def devices_of(row: dict) -> tuple[Sequence[Any], Sequence[str]]:
    """Returns devices to compile for, and the backends of products on them."""
    if chip_of(row) in GPUS:
        # Read when JAX starts: look for the CUDA plugin, and load it without a driver.
        os.environ["JAX_PLATFORMS"] = ""
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental.topologies import get_topology_desc

    topology, chip = row["topology"], chip_of(row)
    if chip not in GPUS:
        description = get_topology_desc(topology, "tpu")
        return description.devices, [f"pallas_tpu_{chip}", "reference"]
    shape, config = topology.partition(":")[2], GPUS[chip]
    description = get_topology_desc("", "cuda", target_config=config, topology=shape)
    return description.devices, ["reference"]


def measure(compiled: Any) -> dict:
    """Returns the bytes on one device of a compiled program, and its collectives."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    names = "argument_size", "temp_size", "host_argument_size", "host_temp_size"
    sizes = {name: getattr(memory, f"{name}_in_bytes") for name in names}
    return sizes | {
        "collectives": collectives(text),
        "kernels": text.count("tpu_custom_call"),
    }


def compile_row(
    row: dict, timeout: float, script: str = __file__, plan: bool = False
) -> dict:
    """Compiles a row in a separate process of `script`; returns its record.

    With `plan`, the compiler is stopped once it has assigned buffers, which is all that
    HBM and host memory depend on. It would generate code after that.
    """
    chip = chip_of(row)
    with tempfile.TemporaryDirectory() as dump:
        env = os.environ | {
            "XLA_FLAGS": f"--xla_dump_to={dump}",
            # JAX looks for the CUDA compiler if no platform is named.
            "JAX_PLATFORMS": "" if chip in GPUS else "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        command = [sys.executable, script, "--one", json.dumps(row)]
        log = pathlib.Path(dump, "log")
        is_planned = run_with_limit(command, env, log, timeout, plan)
        output = log.read_text("utf-8")
        lines = [x for x in output.splitlines() if x.startswith("RESULT ")]
        if lines:
            record = json.loads(lines[-1].removeprefix("RESULT "))
        elif is_planned:
            record = {"is_plan": True}
        elif is_planned is None:
            return row | {"error": f"not compiled within {timeout:.0f} s"}
        else:
            raise RuntimeError(f"{row}: {output[-3000:]}")
        if "error" not in record:
            colors = bytes_by_color(dump)
            record |= {"hbm": colors[0], "host": colors.get(5, 0)}
    if "error" in record:
        record |= _why(record["error"])
    elif record["hbm"] > HBM[chip]:
        record["error"] = "out of memory"
    return row | record


def run_with_limit(
    command: list[str], env: dict, log: pathlib.Path, timeout: float, plan: bool
) -> bool | None:
    """Runs a command that writes to `log`, and XLA's dump to the folder of `log`.

    Returns:
        None if it was stopped after `timeout` seconds, and otherwise whether it was
        stopped since `plan` is True and XLA has assigned buffers.
    """
    end = time.monotonic() + timeout
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
        try:
            while process.poll() is None:
                if plan and [*log.parent.rglob("*after_buffer_assignment.txt")]:
                    time.sleep(10)  # XLA may still be writing the file
                    return True
                if time.monotonic() > end:
                    return None
                time.sleep(1)
            return False
        finally:
            process.kill()
            process.wait()


def bytes_by_color(dump: str) -> dict[int, int]:
    """Reads the bytes of XLA's buffers: color 0 is HBM, 5 pinned host memory."""
    sizes: dict[int, int] = {}
    for report in pathlib.Path(dump).rglob("*memory-usage-report.txt"):
        pattern = r"color=(\d+)\)\nTotal bytes: (\d+)"
        for color, size in re.findall(pattern, report.read_text()):
            sizes[int(color)] = max(sizes.get(int(color), 0), int(size))
    return sizes


def _why(error: str) -> dict:
    """Parses the compiler's error for a program that does not fit."""
    total = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", error) or re.search(
        r"required for HLO temporaries \(([\d.]+)([KMG])\)", error
    )
    if total is None:
        return {"error": error[:1500]}
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}[total[2]]
    return {"error": "out of memory", "hbm": round(float(total[1]) * unit)}


def key_of(row: dict) -> str:
    """Returns the values that identify a row."""
    names = "model", "topology", "chips", "settings"
    return json.dumps({name: row[name] for name in names}, sort_keys=True)


def read_results(path: pathlib.Path = RESULTS) -> list[dict]:
    """Returns the records of a file, or an empty list if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def add_result(record: dict, path: pathlib.Path = RESULTS) -> None:
    """Writes a record to a file, replacing the record of the same row."""
    other_records = [x for x in read_results(path) if key_of(x) != key_of(record)]
    part = path.with_suffix(".part")
    part.write_text(
        "".join(json.dumps(x) + "\n" for x in [*other_records, record]), "utf-8"
    )
    part.replace(path)


def versions() -> dict:
    """Returns the versions that a result depends on."""
    names = "jax", "libtpu", "jax-cuda13-pjrt", "flax", "optax", "torchax"
    installed = {x.metadata["Name"] for x in importlib.metadata.distributions()}
    return {x: importlib.metadata.version(x) for x in names if x in installed}


def can_compile(row: dict) -> bool:
    """Whether what a row needs is installed here: the compiler, and torchax."""
    compiler = "jax-cuda13-pjrt" if chip_of(row) in GPUS else "libtpu"
    needs_torch = row["settings"].get("engine") == "torch"
    return {compiler, *["torchax"] * needs_torch} <= {*versions()}


def compile_missing(
    row: dict,
    args: argparse.Namespace,
    versions: dict,
    path: pathlib.Path = RESULTS,
    script: str = __file__,
    plan: bool = False,
) -> None:
    """Compiles a row in a process of `script`, and adds its result to the file `path`.

    Does nothing if the file has a result of this row, except with `args.again`. `plan`
    is that of `compile_row`.
    """
    if key_of(row) in map(key_of, read_results(path)) and not args.again:
        return
    print(row["name"], flush=True)
    try:
        record = compile_row(row, args.timeout, script, plan)
        record |= {"versions": versions}
    except RuntimeError as error:  # an error other than a program that does not fit
        print(error, file=sys.stderr, flush=True)
        return
    add_result(record, path)
    shown = {k: v for k, v in record.items() if k not in ("settings", "versions")}
    print(json.dumps(shown), flush=True)


def main():
    """Compiles the rows that have no result, or writes the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="text in the names of the rows")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print("RESULT", json.dumps(compile_here(json.loads(args.one))))
    if args.table:
        from scale_tables import fill, tables

        filled = tables(read_results())
        for page in DOCS.glob("*.md"):
            page.write_text(fill(page.read_text("utf-8"), filled), "utf-8")
        return
    for row in ROWS:
        if args.only not in row["name"] or not can_compile(row):
            continue
        compile_missing(row, args, versions())


if __name__ == "__main__":
    main()
