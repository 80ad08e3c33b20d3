"""These tests run only if torchax is installed, which the extra `torch` contains."""

import importlib.util
import warnings

if importlib.util.find_spec("torchax") is None:  # without the extra `torch`
    collect_ignore_glob = ["*.py"]
else:
    with warnings.catch_warnings():  # some of these packages warn when imported
        warnings.simplefilter("ignore")
        import peft  # noqa: F401
        import torch
        import torchax  # noqa: F401

    torch.set_num_threads(1)  # more threads would compete with those of JAX
