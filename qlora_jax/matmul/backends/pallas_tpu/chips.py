"""What suits each TPU chip."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """How the kernel should decode on a chip, and in how much memory.

    Attributes:
        decode: How codes become weights; one of `decode.FORMS`.
        vmem_mib: VMEM that blocks may take, in MiB.
    """

    decode: str
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


def chip_at_hand() -> str:
    """Returns the name in `CHIPS` of this process's device; "any" if it has none."""
    return KINDS.get(jax.devices()[0].device_kind, "any")
