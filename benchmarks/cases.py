"""The cases that peers.py and cpu.py pass to their workers, and the workers' jobs.

A case is a dict, passed as JSON: `kind` ("product", "step", "model", "train",
"generate" or "quantize"), `dtype`, `rows`, and `k`, `n`, `backward` or `layers`,
`width`, `rank`.
Every peer gets the same float32 weights, rounded to the case's dtype, from the same
seed; a whole model's are each peer's own.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLOCK_SIZE = 64
RATE = 1e-4
NEW_TOKENS = 192  # tokens of an answer before generation restarts
# The shape of a Llama, with the keys of its `config.json`.
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY_LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass
class Job:
    """A case, built by a peer: the call to time, its output, and facts to report."""

    call: Any
    output: (
        Any  # () -> NumPy array of the product, or of the stack, in float32; or None
    )
    facts: dict = field(default_factory=dict)


def weights(case: dict) -> np.ndarray:
    """Returns float32 weights: [K, N], or [layers, width, width] for a stack."""
    if "layers" in case:
        shape = (case["layers"], case["width"], case["width"])
    else:
        shape = (case["k"], case["n"])
    w = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    w /= np.float32(np.sqrt(shape[-2]))
    return w


def inputs(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 x [rows, K] and a cotangent or target [rows, N]."""
    k = case.get("k", case.get("width"))
    n = case.get("n", case.get("width"))
    rng = np.random.default_rng(1)

    def draw(m):
        return rng.standard_normal((case["rows"], m), dtype=np.float32)

    return draw(k), draw(n)


def tokens(case: dict) -> np.ndarray:
    """Returns a language model's batch, int64 [rows, length]."""
    shape = case["rows"], case["length"]
    return np.random.default_rng(2).integers(0, case["model"]["vocab_size"], shape)


def sequences(case: dict) -> list[list[tuple[np.ndarray, int]]]:
    """Returns the sequences packed in each row, with the tokens of their prompts.

    Lengths are like those of the example data: about 45 tokens, then an answer of about
    30 target tokens.
    """
    rng = np.random.default_rng(3)

    def draw() -> tuple[np.ndarray, int]:
        prompt, answer = int(rng.integers(40, 51)), int(rng.integers(26, 35))
        ids = rng.integers(0, case["model"]["vocab_size"], prompt + answer)
        return ids.astype(np.int32), prompt

    return [[draw() for _ in range(case["packed"])] for _ in range(case["rows"])]


def width(case: dict) -> int:
    """Returns the length of the packed rows, a multiple of 16."""
    longest = max(sum(len(ids) for ids, _ in row) for row in sequences(case))
    return -(-longest // 16) * 16


def exact_output(case: dict) -> np.ndarray | None:
    """Returns the product, or the stack's output, in float32 by NumPy; else None."""
    if case["kind"] in ("model", "train"):
        return None
    w, x = weights(case), inputs(case)[0]
    if "layers" not in case:
        return x @ w
    for layer in w:
        x = x + np.tanh(x @ layer)
    return x
