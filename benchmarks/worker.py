"""One contestant of peers.py or cpu.py, in a separate process (see `timing.Worker`).

    python worker.py PEER JSON

This builds the case (see cases.py), warms up, prints a line of facts, and then answers
each line on standard input ("time", "memory", "error") with a line of JSON.
"""

import ctypes
import gc
import json
import pathlib
import sys
import tempfile

import numpy as np
from cases import NEW_TOKENS, SMOLLM2_135M, Job, exact_output
from timing import timed, versions


def jax_job(peer: str, case: dict) -> Job:
    """Builds a case for this library, dense JAX or qwix."""
    import jax_peers

    return jax_peers.build(peer, case)


def torch_job(peer: str, case: dict) -> Job:
    """Builds a case for bitsandbytes or dense torch."""
    import torch_peers

    return torch_peers.build(peer, case)


def llama_job(peer: str, case: dict) -> Job:
    """Builds greedy generation by llama.cpp's server, in this process.

    The layers of SmolLM2-135M (of examples/get_model.py) are in Q4_0, and its head is
    in float16.
    """
    import httpx
    from xllamacpp import CommonParams, Server

    from qlora_jax.llm.gguf.save import save_gguf
    from qlora_jax.llm.models.checkpoint import load
    from qlora_jax.llm.models.tiny import save_tiny

    del peer
    out = tempfile.mkdtemp()
    is_tiny = case["model"] != SMOLLM2_135M
    folder = save_tiny(out) if is_tiny else "models/SmolLM2-135M-Instruct"
    _, weights = load(folder, progress=False)
    save_gguf(f"{out}/q4_0.gguf", folder, weights, fmt="Q4_0", progress=False)
    params = CommonParams()
    params.model.path = f"{out}/q4_0.gguf"
    params.n_ctx, params.n_parallel, params.verbosity = 256, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    server = Server(params)
    ids: list[int] = []

    def call():
        # The server caches the prompt, so it reads one token per step like others.
        ids[:] = ids or [1] * 32
        body = {"prompt": ids, "n_predict": case["tokens"], "temperature": 0}
        body |= {"return_tokens": True, "ignore_eos": True, "cache_prompt": True}
        reply = httpx.post(f"{server.listening_address}/completion", json=body).json()
        ids.extend(reply["tokens"])
        if len(ids) >= 32 + NEW_TOKENS:
            ids.clear()

    return Job(call, lambda: None, {"bits": 4.5})


def status_bytes(key: str) -> int:
    """Returns VmRSS or VmHWM (its high-water mark) of this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak() -> bool:
    """Frees unused memory and resets the high-water mark; False if denied."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def main() -> None:
    """Serves one case until standard input closes."""
    peer, case = sys.argv[1], json.loads(sys.argv[2])

    def reply(answer):
        return print(json.dumps(answer), flush=True)

    try:
        name = peer.partition("-")[0]
        foreign_jobs = {
            "bitsandbytes": torch_job,
            "torch": torch_job,
            "llama.cpp": llama_job,
        }
        job = foreign_jobs.get(name, jax_job)(peer, case)
        sample = timed(job.call)
    except Exception as error:  # an error is the peer's result
        return reply({"error": f"{type(error).__name__}: {error}"[:200]})
    reset = forget_peak()
    reply(job.facts | {"versions": versions(), "peak_reset": reset})
    for line in sys.stdin:
        if line.strip() == "time":
            reply({"seconds": sample()})
        elif line.strip() == "memory":
            reply({"peak": status_bytes("VmHWM"), "resident": status_bytes("VmRSS")})
        else:
            want, error = exact_output(case), None
            if want is not None:
                error = np.linalg.norm(job.output() - want) / np.linalg.norm(want)
                error = float(error)
            reply({"error_to_float": error})


if __name__ == "__main__":
    main()
