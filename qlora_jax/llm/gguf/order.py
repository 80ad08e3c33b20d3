"""The order in which llama.cpp stores the rows and columns of matrices.

- Rotary positions rotate pairs of values. In transformers, value i of a head is paired
  with value i + Dh/2, where Dh is the size of a head. In some architectures of
  llama.cpp, the two follow each other.
- In a gated delta rule of transformers, the value heads that share a key head follow
  each other. In llama.cpp, value head i shares key head i % n, where n is the number of
  key heads.
"""

import numpy as np

from ..models.config import DecoderConfig, DeltaRule

# The architectures in which the rows of q and k have another order.
_PERMUTED = ("llama", "smollm3")
# Tensors of a delta rule with one row for each value head.
_HEAD_ROWS = ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")
# Tensors with `value_dim` rows for each value head.
_VALUE_ROWS = ("in_proj_z.weight",)
# Tensors with such rows after the rows of all queries and keys.
_QKV_ROWS = ("in_proj_qkv.weight", "conv1d.weight")


def row_order(
    name: str, num_rows: int, config: DecoderConfig, architecture: str
) -> np.ndarray | None:
    """Returns the indices by which llama.cpp orders rows; None if it is the same."""
    if config.delta_rule is not None:
        return _delta_rule_rows(name, num_rows, config.delta_rule)
    num_heads = {".q_proj.": config.num_heads, ".k_proj.": config.num_kv_heads}
    count = next((num_heads[part] for part in num_heads if part in name), None)
    if architecture not in _PERMUTED or count is None:
        return None
    return np.arange(num_rows).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)


def column_order(name: str, config: DecoderConfig) -> np.ndarray | None:
    """Returns the indices by which llama.cpp orders columns, like `row_order`."""
    rule = config.delta_rule
    if rule is None or not name.endswith("linear_attn.out_proj.weight"):
        return None
    return _order_values(rule, rule.value_dim)


def _delta_rule_rows(name: str, num_rows: int, rule: DeltaRule) -> np.ndarray | None:
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


def _order_values(rule: DeltaRule, size: int) -> np.ndarray:
    """Returns the indices that order all values, of which each head has `size`."""
    shape = rule.num_key_heads, -1, size
    values = np.arange(rule.num_value_heads * size).reshape(shape)
    return values.swapaxes(0, 1).reshape(-1)
