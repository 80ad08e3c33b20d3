"""Fine-tuning on data of one's own: rows, chat templates, batches, steps, states."""

import lazy_loader

# __init__.pyi has the names and their homes. Reading rows loads no Grain, and so on.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
