"""Linear probe: how much of a robot's actions can be read off codes or features by ridge regression."""

import numpy as np
from jaxtyping import Float, Int

PENALTIES = np.logspace(-3, 3, 13)  # as shares of the inputs' mean square norm
FOLDS = 5


def one_hot(indices: Int[np.ndarray, "N Q"], codes: int) -> Float[np.ndarray, "N QC"]:
    """Codes as indicator columns, one group per place."""
    return np.eye(codes)[indices].reshape(len(indices), -1)


def ridge(
    fit: Float[np.ndarray, "N X"], targets: Float[np.ndarray, "N A"], new: Float[np.ndarray, "M X"]
) -> Float[np.ndarray, "P M A"]:
    """Predictions for `new` under each of the `PENALTIES`.

    Works through the Gram matrix of the samples (N × N), so wide inputs cost no more than narrow ones.
    """
    mean, target_mean = fit.mean(0), targets.mean(0)
    x = fit - mean
    values, vectors = np.linalg.eigh(x @ x.T)
    rotated = vectors.T @ (targets - target_mean)
    projected = (new - mean) @ x.T @ vectors
    scale = max(values.mean(), 1e-12)
    shrunk = rotated / (values.clip(0) + PENALTIES[:, None] * scale)[:, :, None]
    return projected @ shrunk + target_mean


def fit_and_predict(
    fit: Float[np.ndarray, "N X"],
    targets: Float[np.ndarray, "N A"],
    new: Float[np.ndarray, "M X"],
    *,
    groups: Int[np.ndarray, " N"],
) -> Float[np.ndarray, "M A"]:
    """Predictions for `new` of a ridge regression whose penalty is chosen by cross-validation on `fit`.

    Samples of one group (overlapping pairs of one clip, say) are never on both sides of a split, else close
    neighbours would hide overfitting.
    """
    fold = np.unique(groups, return_inverse=True)[1] % FOLDS
    errors = np.zeros(len(PENALTIES))
    for k in np.unique(fold):
        held = fold == k
        if not held.all():
            guess = ridge(fit[~held], targets[~held], fit[held])
            errors += ((guess - targets[held]) ** 2).sum((1, 2))
    return ridge(fit, targets, new)[int(np.argmin(errors))]


def r2(
    truth: Float[np.ndarray, "M A"], predicted: Float[np.ndarray, "M A"]
) -> tuple[list[float | None], float | None]:
    """R² of each target, and of all together: the share of their summed variance that is explained.

    None where there is no variance to explain.
    """
    spread = ((truth - truth.mean(0)) ** 2).sum(0)
    residual = ((truth - predicted) ** 2).sum(0)
    *each, together = (
        float(1 - left / whole) if whole > 0 else None
        for left, whole in zip([*residual, residual.sum()], [*spread, spread.sum()])
    )
    return each, together
