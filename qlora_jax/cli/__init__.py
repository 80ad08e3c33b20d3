"""The commands of `qlora-jax`, and the same as Python calls."""

import lazy_loader

# __init__.pyi has the names and their homes. Flax and models are loaded on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
