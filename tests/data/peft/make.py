"""Makes golden.npz and golden.json: LoRA as PEFT computes it on one small Linear.

Run it in a separate environment with torch (CPU) and peft:

    python tests/data/peft/make.py

Arrays have the layout of PEFT: W [out, in], A [rank, in], B [out, rank]. Inputs come
from `np.random.default_rng(seed)`, drawn in the order x, W, A, B in float32.
"""

import json
import pathlib

import numpy as np
import peft
import torch

FOLDER = pathlib.Path(__file__).parent
K, N, ROWS = 40, 24, 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [
    {"name": "default-alpha", "rank": 4, "alpha": 4, "rslora": False, "seed": 0},
    {"name": "alpha", "rank": 4, "alpha": 32, "rslora": False, "seed": 1},
    {"name": "rslora", "rank": 8, "alpha": 16, "rslora": True, "seed": 2},
    {"name": "odd-rank", "rank": 3, "alpha": 10, "rslora": True, "seed": 3},
]


def adapted(linear: torch.nn.Linear, **options) -> torch.nn.Module:
    """Returns PEFT's LoRA model around a module that holds `linear` as "proj"."""
    model = torch.nn.ModuleDict({"proj": linear})
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="proj", **options))


def run(case: dict, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Returns forward, gradients and merged weight of one case."""
    rng = np.random.default_rng(case["seed"])
    shapes = ((ROWS, K), (N, K), (case["rank"], K), (N, case["rank"]))

    def draw(shape):
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    x, w, a, b = map(draw, shapes)
    linear = torch.nn.Linear(K, N, bias=False, dtype=dtype)
    linear.weight.data.copy_(w)
    options = dict(lora_alpha=case["alpha"], use_rslora=case["rslora"])
    model = adapted(linear, r=case["rank"], **options)
    layer = model.base_model.model["proj"]
    layer.lora_A["default"].weight.data.copy_(a)
    layer.lora_B["default"].weight.data.copy_(b)
    case["scaling"] = layer.scaling["default"]
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    out = {"y": y, "grad_x": x.grad, "grad_a": layer.lora_A["default"].weight.grad}
    out |= {"grad_b": layer.lora_B["default"].weight.grad}
    out |= {"delta": layer.get_delta_weight("default")}
    assert out["grad_a"].dtype == torch.float32
    layer.merge()
    out["merged"] = layer.get_base_layer().weight
    return {key: value.detach().float().numpy() for key, value in out.items()}


def initial(rank: int, k: int, n: int) -> dict:
    """Returns what PEFT's default initialization looks like for a [n, k] weight."""
    torch.manual_seed(0)
    model = adapted(torch.nn.Linear(k, n, bias=False), r=rank)
    layer = model.base_model.model["proj"]
    a = layer.lora_A["default"].weight.detach().double()
    b = layer.lora_B["default"].weight.detach()
    return {
        "rank": rank,
        "k": k,
        "n": n,
        "a_mean": a.mean().item(),
        "a_std": a.std(correction=0).item(),
        "a_max_abs": a.abs().max().item(),
        "a_mean_abs": a.abs().mean().item(),
        "b_max_abs": b.abs().max().item(),
    }


def main() -> None:
    """Writes golden.npz and golden.json into this folder."""
    arrays = {}
    for case in CASES:
        for name, dtype in DTYPES.items():
            for key, value in run(case, dtype).items():
                arrays[f"{case['name']}/{name}/{key}"] = value
    np.savez_compressed(FOLDER / "golden.npz", **arrays)
    head = {
        "peft": peft.__version__,
        "torch": torch.__version__,
        "shape": {"k": K, "n": N, "rows": ROWS},
        "cases": CASES,
        "initial": [initial(16, 1024, 512), initial(64, 256, 64)],
    }
    (FOLDER / "golden.json").write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
    main()
