"""Settings for each TPU chip."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """How the kernel decodes on a chip, and in how much memory.

    Attributes:
        form: How codes become weights: "shuffle" (v6e, tpu7x), "sublane" (v4, v5e,
            v5p) or "select" (anywhere); all give the same weights.
        vmem_mib: VMEM that blocks may take, in MiB: 96 suits v5e and v6e, which have
            128; 48 those with 64.
    """

    form: str
    vmem_mib: int


CHIPS = {
    "v5e": Chip("sublane", 96),
    "v5p": Chip("sublane", 48),
    "v6e": Chip("shuffle", 96),
    "7x": Chip("shuffle", 48),
    "any": Chip("select", 48),
}
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "7x",
}


def this_chip() -> str:
    """Returns the name in `CHIPS` of this process's device; "any" if it has none."""
    return KINDS.get(jax.devices()[0].device_kind, "any")
