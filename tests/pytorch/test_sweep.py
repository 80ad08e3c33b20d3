"""Model types that passed the sweep still pass it. Each day, another ten are tested."""

import datetime
import warnings

import pytest
import sweep

PASSED = sorted(kind for kind, row in sweep.read_rows().items() if row[0] == "ok")
FIRST = datetime.date.today().toordinal() * 10


@pytest.mark.slow
@pytest.mark.parametrize("index", range(10))
def test_models_that_passed_the_sweep(index):
    kind = PASSED[(FIRST + index) % len(PASSED)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of tiny configs
        word, *details = sweep.result_of(kind)
    assert word == "ok", (kind, details)
