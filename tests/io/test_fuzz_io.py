"""A few hundred of the broken files of `fuzz_io.py`."""

import fuzz_io


def test_only_our_own_errors_come_out():
    counts = fuzz_io.run(60 * len(fuzz_io.READERS))
    for name, (read, refused) in counts.items():
        assert refused > 5, name
        assert read + refused == 60, name
