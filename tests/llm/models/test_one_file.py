"""The file of a merge-aware adapter, read by this library, has the loss of training.

tests/interop/test_one_file.py has the programs that serve these files.
"""

import jax
import pytest
from one_file_helpers import CASES, mean_loss, train
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import load


# Noise would round other weights to another code.
@pytest.mark.slow
@pytest.mark.without_noise
@pytest.mark.parametrize("name", [x for x in CASES if CASES[x].layout != "gguf"])
def test_the_loss_of_the_file_is_that_of_training(name, tmp_path):
    case = CASES[name]
    trained = train(tmp_path / "float", case)
    file = trained.save(tmp_path / "file")
    (_, packed), (_, base) = (
        load(file, dtype, progress=False) for dtype in (case.dtype, "float32")
    )
    # As in training, norms and embeddings are float32 beside kernels of any dtype.
    base = jax.tree.map(
        lambda x, y: x if ql.is_packed(x) else y, packed, base, is_leaf=ql.is_packed
    )
    leaves = jax.tree.leaves(base, is_leaf=ql.is_packed)
    kernels = [leaf for leaf in leaves if ql.is_packed(leaf)]
    assert len(kernels) == 7
    assert {x.dtype.name for x in kernels} == {case.dtype}
    for kernel in kernels:  # the file does not say which rule found the scales
        assert case.target_fmt in kernel.packing.format.equivalents
    assert_close(mean_loss(trained.logits(base)), trained.loss)
    # Packing changes the loss of ordinary adapters with the same factors.
    ordinary = mean_loss(trained.logits(trained.base, trained.ordinary))
    assert abs(ordinary - trained.loss) > 0.01
