"""Linear probe: how much of a robot's actions can be read off codes or features by ridge regression."""

import numpy as np
from jaxtyping import Float, Int

PENALTIES = np.logspace(-2, 5, 15)


def one_hot(indices: Int[np.ndarray, "N Q"], codes: int) -> Float[np.ndarray, "N QC"]:
    """Codes as indicator columns, one group per place."""
    return np.eye(codes)[indices].reshape(len(indices), -1)


def ridge_r2(
    fit: Float[np.ndarray, "N X"],
    fit_targets: Float[np.ndarray, "N A"],
    test: Float[np.ndarray, "M X"],
    test_targets: Float[np.ndarray, "M A"],
) -> Float[np.ndarray, " A"]:
    """R² of each target on the test samples; the penalty is chosen by leave-one-out error on the fit samples.

    Works through the Gram matrix of the samples (N × N), so wide features cost no more than narrow ones.
    A target that does not vary gets NaN.
    """
    mean, target_mean = fit.mean(0), fit_targets.mean(0)
    x, y = fit - mean, fit_targets - target_mean
    values, vectors = np.linalg.eigh(x @ x.T)
    values, rotated = values.clip(0), vectors.T @ y
    errors = []
    for penalty in PENALTIES:
        shrink = penalty / (values + penalty)
        residual = vectors @ (shrink[:, None] * rotated)
        leverage = (vectors**2) @ shrink
        errors.append(((residual / leverage[:, None]) ** 2).mean())
    penalty = PENALTIES[int(np.argmin(errors))]
    dual = vectors @ (rotated / (values + penalty)[:, None])
    predicted = ((test - mean) @ x.T) @ dual + target_mean
    spread = ((test_targets - test_targets.mean(0)) ** 2).sum(0)
    residual = ((test_targets - predicted) ** 2).sum(0)
    return np.where(spread > 1e-12, 1 - residual / spread.clip(1e-12), np.nan)
