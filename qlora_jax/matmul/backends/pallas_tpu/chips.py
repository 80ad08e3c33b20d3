"""Settings for each TPU chip."""

from typing import NamedTuple


class Chip(NamedTuple):
    """The form in which the kernel decodes on a chip, and the memory it may take."""

    form: str  # as in `decode`; all give the same weights
    vmem_mib: int  # for blocks: 96 of 128 MiB (v5e, v6e), 48 of 64


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
