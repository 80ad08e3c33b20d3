"""Fine-tuning: rows, chat templates, batches, steps and training state."""

import lazy_loader

# __init__.pyi has the names and their homes. Reading rows loads no Grain, and so on.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
