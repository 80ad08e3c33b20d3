"""The quality numbers of benchmarks/formats_quality.py, and its picture."""

import formats_quality
import jax.numpy as jnp
import numpy as np
from helpers import TABLES, quantize, relative_error
from matplotlib.text import Text
from tolerances import assert_close

NF4 = {"fmt": "nf4", "block_size": 64, "double_quant": False}


def test_errors_are_root_mean_squares_over_layers():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    layers = [(draw(64, 8), draw(5, 64)), (3 * draw(128, 4), draw(5, 128))]
    weights, outputs = [], []
    for w, x in layers:
        codes, scales = quantize(w, "nf4", 64)
        decoded = TABLES["nf4"][codes] * np.repeat(scales, 64, axis=0)
        weights.append(relative_error(decoded, w))
        outputs.append(relative_error(x @ decoded, x @ w))
    expected = [100 * np.sqrt(np.mean(np.square(x))) for x in (weights, outputs)]
    layers = [(jnp.asarray(w), jnp.asarray(x)) for w, x in layers]
    errors = formats_quality.encoder_errors(layers, NF4)
    assert_close(list(errors), [4 + 32 / 64, *expected])


def test_names_in_the_picture_do_not_overlap():
    qualities = [
        formats_quality.Quality(name, bits, 0, 9 + 0.01 * i, 0, 3, 36, 0.4, 0.05)
        for i, (name, bits) in enumerate(
            [("nf4, 64", 4.5), ("q4_0, 32", 4.5), ("mxfp4, 32", 4.25), ("int8", 8.1)]
        )
    ]
    assert len(qualities[0].row()) == len(formats_quality.HEADER)
    figure = formats_quality.draw(qualities)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # no lines
        assert len(boxes) == 3
        pairs = ((a, b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert not any(a.overlaps(b) for a, b in pairs)
