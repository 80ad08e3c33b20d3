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

import numpy as np
from cases import Job, exact_output
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
    """Builds a case for llama.cpp."""
    import llama_peer

    return llama_peer.build(peer, case)


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
