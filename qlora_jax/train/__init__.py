"""Fine-tuning: rows, chat templates, batches, steps and training state."""

import lazy_loader

# `__init__.pyi` maps names to modules, which are imported on first use. Reading rows,
# for example, does not import Grain.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
