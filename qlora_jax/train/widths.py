"""Few widths of batches for sequences of many lengths."""

import numpy as np

MULTIPLE = 8  # of tokens
MOST = 8  # widths
_PADDING = 0.05  # the share of padding that is not worth another program


def round_up(lengths: np.ndarray | int, multiple: int = MULTIPLE) -> np.ndarray:
    """Returns the next multiple, at least one."""
    return np.maximum(-(-np.asarray(lengths) // multiple), 1) * multiple


def choose_widths(lengths: np.ndarray) -> np.ndarray:
    """Chooses the fewest widths, at most eight, that leave little padding.

    Each sequence is padded to the next width. For each number of widths, the best ones
    are found by dynamic programming over the lengths, rounded up.

    Args:
        lengths: How long the sequences are.

    Returns:
        The widths, in rising order.

    Example:
        >>> choose_widths(np.array([5, 6, 7, 60, 64, 64, 500])).tolist()
        [8, 64, 504]
    """
    widths, counts = np.unique(round_up(lengths), return_counts=True)
    total = lengths.sum()
    upto = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: the least padded tokens of the sequences up to width j, by `number` of
    # widths of which j is the last; before[number][j]: the width before it, from 1.
    cost = upto[1:] * widths
    before = [np.zeros(len(widths), int)]
    while cost[-1] * (1 - _PADDING) > total and len(before) < min(MOST, len(widths)):
        so_far = np.concatenate([[np.inf], cost])
        new, chosen = np.empty(len(widths)), np.zeros(len(widths), int)
        for j, width in enumerate(widths):
            candidates = so_far[: j + 1] + (upto[j + 1] - upto[: j + 1]) * width
            chosen[j] = int(candidates.argmin())
            new[j] = candidates[chosen[j]]
        cost, before = new, [*before, chosen]
    found, j = [], len(widths)
    for chosen in reversed(before):
        found.append(int(widths[j - 1]))
        j = int(chosen[j - 1])
    return np.array(found[::-1])
