"""Weights that servers keep as one."""

# Modules of a layer that have the same inputs.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused_with(name: str) -> list[str]:
    """Returns the names of the weights that servers keep in one with this, and its own.

    NVFP4 has a float32 for each weight, of which they keep one for all of them.
    """
    for modules in _FUSED:
        for module in modules:
            if f".{module}." in name:
                return [name.replace(f".{module}.", f".{one}.") for one in modules]
    return [name]
