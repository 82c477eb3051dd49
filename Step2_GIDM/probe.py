"""Linear probe: how much of a robot's actions can be read off codes or features by ridge regression."""

import numpy as np
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold

PENALTIES = np.logspace(-3, 3, 13)  # as shares of the inputs' variance
FOLDS = 5


def one_hot(indices: Int[np.ndarray, "N Q"], codes: int) -> Float[np.ndarray, "N QC"]:
    """Codes as indicator columns, one group per place."""
    return np.eye(codes)[indices].reshape(len(indices), -1)


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
    rotation = PCA().fit(fit)  # a ridge regression does not mind, and has no more columns than samples
    scale = max(rotation.explained_variance_.sum(), 1e-12)
    folds = GroupKFold(min(FOLDS, count)) if (count := len(np.unique(groups))) > 1 else None
    ridge = RidgeCV(PENALTIES * scale, cv=folds and list(folds.split(fit, groups=groups)))
    return ridge.fit(rotation.transform(fit), targets).predict(rotation.transform(new))


def r2(truth: Float[np.ndarray, "M A"], predicted: Float[np.ndarray, "M A"]) -> tuple[list[float], float]:
    """R² of each target, and of all together: the share of their summed variance that is explained."""
    each = r2_score(truth, predicted, multioutput="raw_values")
    return each.tolist(), float(r2_score(truth, predicted, multioutput="variance_weighted"))
