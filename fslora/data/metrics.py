"""Scores of a classifier, from class ids: accuracy, F1 and Matthews' correlation."""

from typing import Literal

import numpy as np
import numpy.typing as npt

MetricName = Literal["accuracy", "f1", "mcc"]
Ids = npt.NDArray[np.int64]


def score(metric: MetricName, truth: Ids, guess: Ids, classes: int) -> float:
    """Score guessed class ids against the true ones.

    Args:
        metric: `accuracy`; `f1`: of the last class if there are two (the positive one), else the
            mean over the classes that occur in truth or guess; `mcc`: Matthews' correlation,
            for more than two classes its generalisation R_K.
        truth: [examples], ids from 0 to classes - 1.
        guess: [examples], likewise.
        classes: how many classes there are.

    Returns:
        The score, at most 1. F1 and mcc are 0 where their denominator is.

    Source: R_K is Gorodkin, Comput. Biol. Chem. 28 (2004) 367, equation 8.
    """
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (truth, guess), 1)
    hits = confusion.diagonal()
    true_counts, guess_counts = confusion.sum(axis=1), confusion.sum(axis=0)
    total = confusion.sum()
    if metric == "accuracy":
        return float(hits.sum() / total)
    if metric == "f1":
        occurrences = true_counts + guess_counts
        f1 = 2 * hits / np.maximum(occurrences, 1)
        return float(f1[-1] if classes == 2 else f1[occurrences > 0].mean())
    covariance = hits.sum() * total - true_counts @ guess_counts
    spread = (total**2 - true_counts @ true_counts) * (total**2 - guess_counts @ guess_counts)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0
