"""The commands of `qlora-jax` as Python functions, and their settings."""

import lazy_loader

# __init__.pyi lists the public names. Their modules are imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
