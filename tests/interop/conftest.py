"""These tests run where what `.[interop]` names is installed."""

import importlib.util
import warnings

if importlib.util.find_spec("xllamacpp") is None:  # as in most environments
    collect_ignore_glob = ["*.py"]
else:
    with warnings.catch_warnings():  # some warn when they are imported
        warnings.simplefilter("ignore")
        import peft  # noqa: F401
        import torch

    torch.set_num_threads(1)  # its threads wait for each other, and JAX has some too
