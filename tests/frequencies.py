"""Whether drawn frequencies fit exact probabilities."""

import numpy as np

# 99.9th percentile of chi-squared for 1 to 7 degrees of freedom (NIST/SEMATECH handbook, table 1.3.6.7.4).
CRITICAL = {1: 10.828, 2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515, 6: 22.458, 7: 24.322}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic over the candidates that can be drawn; anything else drawn is an error at once."""
    assert counts[probabilities == 0].sum() == 0
    possible = probabilities > 0
    expected = counts.sum() * probabilities[possible]
    return float(((counts[possible] - expected) ** 2 / expected).sum())
