"""Seconds of a training step on paper: bytes and operations, over stated rates.

Nothing here is measured. The assumptions:

- **Operations.** A linear module with a frozen kernel is multiplied three times per
  token: in the forward pass, in its recomputation (`remat`), and for the input's
  gradient. An adapter is multiplied once more for its own gradient. Causal splash
  attention takes eleven products of half the scores: two forward, two recomputed, and
  seven in its two backward kernels. The head is multiplied twice
  (`losses.chunked_cross_entropy`). The reference of DPO takes another forward pass,
  without adapters.
- **HBM** traffic is base and adapters, read in the three passes, and what the optimizer
  reads and writes. Activations are left out, since their products are compute-bound.
- **The host's link** carries each layer's input out and back if they are offloaded,
  Adam's moments in and out if they are offloaded, and a streamed base twice.
- **Between chips**: the bytes of the compiled program's collectives, an all-reduce
  counted twice, a reduce-scatter as often as it has parts, each without the part that a
  chip already has.
- **Rates** are a share of the peaks in `scale_models.CHIPS`: see `SHARES`.

If all parts overlap (`best`), a step takes as long as the slowest part. If none do
(`worst`), it takes the sum.
"""

import math
from dataclasses import dataclass

from scale_models import CHIPS, MODELS, chip_of

from qlora_jax.llm.models.config import DecoderConfig

# Shares of the peaks. Those of products and attention are guesses: no TPU ran this.
SHARES = {"products": 0.6, "attention": 0.4, "hbm": 0.8, "host": 1.0, "ici": 0.7}
PACKED = 4.127 / 8  # bytes of a weight in nf4, blocks of 64, double quantization


@dataclass(frozen=True)
class Estimate:
    """The seconds of each part of a step.

    Attributes:
        products: Products of linear modules, adapters and head.
        attention: Attention.
        hbm: Reading weights and the optimizer's state.
        host: The host's link.
        ici: Collectives.
    """

    products: float
    attention: float
    hbm: float
    host: float
    ici: float

    @property
    def best(self) -> float:
        """The seconds of a step if all parts overlap."""
        arithmetic = self.products + self.attention  # on the same unit
        return max(arithmetic, self.hbm, self.host, self.ici)

    @property
    def worst(self) -> float:
        """The seconds of a step if no parts overlap."""
        return self.products + self.attention + self.hbm + self.host + self.ici


def linear_shapes(c: DecoderConfig) -> list[tuple[int, int]]:
    """Returns K and N of a layer's linear modules."""
    d, f = c.hidden_size, c.intermediate_size
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]


def linear_weights(c: DecoderConfig) -> int:
    """Returns the weights of all linear modules but the head."""
    return c.num_layers * sum(k * n for k, n in linear_shapes(c))


def adapter_weights(c: DecoderConfig, rank: int) -> int:
    """Returns the weights of adapters on all linear modules but the head."""
    return c.num_layers * rank * sum(k + n for k, n in linear_shapes(c))


def estimate(record: dict) -> Estimate:
    """Estimates a step of a row of `aot_scale.py` with its collectives."""
    chip = CHIPS[chip_of(record)]
    c, settings = MODELS[record["model"]], record["settings"]
    chips, rank = record["chips"], settings["lora_r"]
    tokens, rows = settings["max_length"], settings["batch_size"]
    linear, adapter = linear_weights(c), adapter_weights(c, rank)
    head = c.vocab_size * c.hidden_size
    passes = 4 if settings.get("remat", True) else 3
    reference = 0
    if settings.get("objective") == "dpo":  # pairs, and a forward pass without adapter
        rows, reference = 2 * rows, 1
    base_passes = passes - 1 + reference
    operations_per_token = (
        base_passes * linear + passes * adapter + (2 + reference) * head
    )
    operations = 2 * rows * tokens * operations_per_token
    scores = tokens**2 * c.num_heads * c.head_dim  # two operations, half of them seen
    attention = (passes - 3 + reference) * 2 + 9
    stored = 2 * linear if settings.get("fmt") == "none" else PACKED * linear
    # Each chip of a group that splits rows reads the gathered weights.
    split = chips if "fsdp" not in settings.get("mesh", "") else 1
    hbm = base_passes * stored / split + (4 * passes + 20) * adapter / chips
    host = 0.0
    if settings.get("remat") == "offload":
        host += 2 * 2 * rows * tokens * c.hidden_size * c.num_layers / chips
    if settings.get("offload_optimizer"):
        host += 4 * 4 * adapter / chips
    if settings.get("base_memory") == "host":
        host += (2 + reference) * stored
    moved_bytes = 0.0
    # Sums of products are scattered over the axis `tensor`: each chip has a part.
    mesh = dict(x.split("=") for x in settings.get("mesh", "").split(",") if x)
    times = {"all-reduce": 2, "reduce-scatter": int(mesh.get("tensor", 1))}
    for x in record.get("collectives", ()):
        moved_bytes += x["bytes"] * times.get(x["operation"], 1)

    def seconds_at(amount, peak, share):
        return amount / (peak * SHARES[share])

    return Estimate(
        products=seconds_at(operations / chips, chip.flops, "products"),
        attention=seconds_at(
            rows * c.num_layers * attention * scores / chips, chip.flops, "attention"
        ),
        hbm=seconds_at(hbm, chip.hbm_rate, "hbm"),
        host=seconds_at(host, chip.host_rate, "host"),
        ici=seconds_at(moved_bytes * (1 - 1 / chips), chip.ici_rate, "ici"),
    )


def break_even(chip: str) -> int:
    """Returns the tokens of a step from which a streamed base costs no time.

    Each weight is transferred twice, and multiplied three times per token, so the
    number of weights cancels. Attention is left out, which overestimates the tokens.

    Args:
        chip: A name in `CHIPS`.
    """
    chip_rates = CHIPS[chip]
    transfer = 2 * PACKED / (chip_rates.host_rate * SHARES["host"])
    token = 3 * 2 / (chip_rates.flops * SHARES["products"])
    return math.ceil(transfer / token)
