"""These tests run where torchax is installed, as the extra `torch` does."""

import importlib.util
import warnings

if importlib.util.find_spec("torchax") is None:  # as in most environments
    collect_ignore_glob = ["*.py"]
else:
    with warnings.catch_warnings():  # some warn when they are imported
        warnings.simplefilter("ignore")
        import peft  # noqa: F401
        import torch
        import torchax  # noqa: F401

    torch.set_num_threads(1)  # its threads wait for each other, and JAX has some too
