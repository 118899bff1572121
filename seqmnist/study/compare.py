"""Differences between entries of a study, with their uncertainty.

Entries are trained from the same seeds, so scores are paired: a seed determines the order of
examples, the same for every network. A seed that diverged in one of two entries counts for neither.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from seqmnist.training import members

LEVEL = 0.05  # of the family of all tests


def differences(scores: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Compares each pair of entries by their scores, [seeds] each, None if diverged.

    Returns for each pair {"entries": [a, b], "pairs": number of seeds, "mean": of a - b,
    "interval": 95 %, "p", "p_holm", "is_significant"}: Student's t-test of paired samples,
    corrected for all pairs by Holm's method. With fewer than two seeds, or if all differences are
    equal, there is no test: its values are None.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal
    of Statistics 6 (1979).
    """
    rows = []
    for a, b in itertools.combinations(scores, 2):
        delta = np.array(scores[a], float) - np.array(scores[b], float)
        delta = delta[np.isfinite(delta)]
        found = members.statistics(delta)
        row = {"entries": [a, b], "pairs": len(delta), "mean": found["mean"]}
        row |= {"interval": None, "p": None}
        if len(delta) > 1 and np.ptp(delta) > 1e-9:  # equal but for rounding
            p = float(stats.ttest_1samp(delta, 0).pvalue)
            row |= {"interval": found["interval"], "p": p}
        rows.append(row)
    corrected = holm([row["p"] for row in rows if row["p"] is not None])
    for row in rows:
        row["p_holm"] = None if row["p"] is None else corrected.pop(0)
        row["is_significant"] = row["p_holm"] is not None and row["p_holm"] <= LEVEL
    return rows


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected by Holm's method, in the same order."""
    order = np.argsort(p_values)
    scaled = np.array(p_values, float)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected.tolist()
