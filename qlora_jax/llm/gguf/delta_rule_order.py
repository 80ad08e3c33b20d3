"""The order in which llama.cpp stores the value heads of a gated delta rule.

In transformers, the value heads that share a key head follow each other. In llama.cpp,
value head i shares key head i % n, where n is the number of key heads.
"""

import numpy as np

from ..models.config import DecoderConfig, DeltaRule

# Tensors with one row for each value head.
_HEAD_ROWS = ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")
# Tensors with `value_dim` rows for each value head.
_VALUE_ROWS = ("in_proj_z.weight",)
# Tensors with such rows after the rows of all queries and keys.
_QKV_ROWS = ("in_proj_qkv.weight", "conv1d.weight")


def value_row_order(
    name: str, num_rows: int, config: DecoderConfig
) -> np.ndarray | None:
    """Returns the indices by which llama.cpp orders rows; None if it is the same."""
    rule = config.delta_rule
    assert rule is not None
    part = name.rpartition("linear_attn.")[2]
    if part in _HEAD_ROWS:
        return _order_values(rule, 1)
    if part in _VALUE_ROWS:
        return _order_values(rule, rule.value_dim)
    if part in _QKV_ROWS:
        values = _order_values(rule, rule.value_dim)
        start = num_rows - len(values)  # of the values
        return np.concatenate([np.arange(start), start + values])
    return None


def value_column_order(name: str, config: DecoderConfig) -> np.ndarray | None:
    """Returns the indices by which llama.cpp orders columns, like `value_row_order`."""
    if not name.endswith("linear_attn.out_proj.weight"):
        return None
    rule = config.delta_rule
    assert rule is not None
    return _order_values(rule, rule.value_dim)


def _order_values(rule: DeltaRule, size: int) -> np.ndarray:
    """Returns the indices that order all values, of which each head has `size`."""
    shape = rule.num_key_heads, -1, size
    values = np.arange(rule.num_value_heads * size).reshape(shape)
    return values.swapaxes(0, 1).reshape(-1)
