"""Data that a tiny model learns in a few steps."""

import json

import numpy as np

SIGNS = "abcdefgh"


def write_letters(folder):
    """Writes prompts of two letters whose answer is the first one, twice."""
    for name, count, seed in (("train", 40, 0), ("valid", 6, 1)):
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(count):
            one, two = rng.choice([*SIGNS], 2)
            rows.append({"prompt": f"{one}{two}=", "completion": str(one) * 2})
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder
