"""Do the codes mean anything? `python -m Step2_GIDM.health …` (configs/step2_health.yaml).

Four questions, on held-out pairs. Are the codes used (perplexity, dead codes)? Does the decoder read them
(its error with the right latent action against another pair's)? Do they name what a robot did (linear probe
from codes to actions, fitted on training clips, beside random codes and differences of DINO features)?
Does a latent action of one clip mean the same in another (transfer)?
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold

from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError
from defi.robot.spec import Vector
from Step2_GIDM.code_evaluation import CodeEvaluation, evaluate_codes, transfer
from Step2_GIDM.data.build import build_pairs
from Step2_GIDM.data.pairs import PairDataset, later
from Step2_GIDM.gallery import draw_gallery, draw_transfer
from Step2_GIDM.model import GIDM

STILL = 0.1  # actions that deviate less than this (CALVIN's: 2 mm, 0.3 degrees) do not count as varying
PENALTIES = np.logspace(-3, 3, 13)  # of the ridge regression, as shares of the inputs' variance
FOLDS = 5  # of the cross-validation that chooses one


class Probed(NamedTuple):
    """Pairs with what the robot did between their frames."""

    seen: CodeEvaluation
    clips: Int[np.ndarray, " N"]
    actions: Float[np.ndarray, "N A"]

    @classmethod
    def of(cls, data: PairDataset, seen: CodeEvaluation) -> "Probed":
        """The sum of relative actions, the mean of absolute ones between the frames of each pair."""
        motions, relative, rows = data.data.motions, np.array(data.data.robot().actions.relative), []
        for episode, _, now in map(data.locate, seen.pairs.tolist()):
            moves = later(episode, now, data.distance[1]) - now  # 0 where both frames are the last
            first = int(motions.rows(np.array(episode.start + now)))
            actions = motions.actions[first : first + max(1, moves)].astype(np.float64)
            rows.append(np.where(relative, actions[:moves].sum(0), actions.mean(0)))
        return cls(seen, np.searchsorted(data.ends, seen.pairs, side="right"), np.array(rows))


def one_hot(indices: Int[np.ndarray, "N Q"], codes: int) -> Float[np.ndarray, "N QC"]:
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
    splits = folds and list(folds.split(fit, groups=groups))
    # Scored by R², actions that hardly vary would count as much as the others.
    ridge = RidgeCV(PENALTIES * scale, cv=splits, scoring="neg_mean_squared_error")
    guess = ridge.fit(rotation.transform(fit), targets).predict(rotation.transform(new))
    return guess.reshape(len(new), -1)  # of a single action it is a row


def probe(
    fit: Probed, test: Probed, actions: Vector, codes: int, *, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """R² on `test` of ridge regressions fitted on `fit`: per action that varies in both, and of `all`.

    Actions weigh by their variance in `all`, so that those that hardly vary hardly count; where units are not
    known, all that vary weigh alike. Inputs: the codes, random codes, and differences of DINO features (what
    codes could hold at best). Where no action varies there is nothing to explain: None.
    """
    scale = np.where([unit != "" for unit in actions.units], 1, np.maximum(fit.actions.std(0), 1e-12))
    fitted, tested = fit.actions / scale, test.actions / scale
    varies = (fitted.std(0) > STILL) & (tested.std(0) > STILL)
    draw = np.random.default_rng(seed)

    def inputs(part: Probed) -> dict[str, np.ndarray]:
        indices = part.seen.indices.numpy()
        return {
            "codes": one_hot(indices, codes),
            "random codes": one_hot(draw.integers(codes, size=indices.shape), codes),
            "feature differences": part.seen.difference.double().numpy(),
        }

    found, new = inputs(fit), inputs(test)
    if not varies.any():
        return {name: {"all": None} for name in found}
    truth, result = tested[:, varies], {}
    for name, x in found.items():
        guess = fit_and_predict(x, fitted[:, varies], new[name], groups=fit.clips)
        each = r2_score(truth, guess, multioutput="raw_values")
        result[name] = dict(zip(np.array(actions.names)[varies].tolist(), each.tolist()))
        result[name]["all"] = float(r2_score(truth, guess, multioutput="variance_weighted"))
    return result


def report(numbers: dict[str, Any], codes: int) -> None:
    """Print the figures."""
    console = Console()
    console.print(
        f"codes used      {codes - int(numbers['dead_codes'])} of {codes}, "
        f"perplexity {numbers['perplexity']:.1f}, tuples {numbers['variety']:.1f}\n"
        f"prediction      error {numbers['mse']:.4f}; with another pair's latent action "
        f"{numbers['shuffled_mse']:.4f}; copying the earlier frame {numbers['copy_mse']:.4f}"
    )
    if (cosine := numbers.get("transfer_cosine")) is not None:
        console.print(f"transfer        to other clips: cosine of the motions {cosine:.2f}")
    if "probe" in numbers:
        scores, names = list(numbers["probe"].values()), list(numbers["probe"]["codes"])
        table = Table("R²", *numbers["probe"], title="robot actions read linearly from")
        for name in names:  # a robot may have many
            table.add_row(name, *("—" if each[name] is None else f"{each[name]:.2f}" for each in scores))
        console.print(table)
        if names == ["all"]:
            console.print("No action varies in both splits: there is nothing to probe.")


@entry("step2_health")
def main(cfg: DictConfig) -> None:
    output = check_output(cfg.output, overwrite=cfg.overwrite)
    model = GIDM.from_pretrained(find_weights(Path(cfg.checkpoint), stage="gidm"))
    codes, side = model.config.codes, model.config.dino.image_size
    data = build_pairs(cfg.data, side, "held_out")
    seen = evaluate_codes(model, data, cfg.pairs)
    numbers: dict[str, Any] = seen.numbers(codes)
    if isinstance(data, PairDataset) and data.data.action_names:
        training, actions = build_pairs(cfg.data, side, augment=False), data.data.robot().actions
        same = (training.data.root, training.fingerprint) == (data.data.root, data.fingerprint)
        if same and np.isin(data.data.starts, training.data.starts).any():
            raise UserError(f"data.held_out={cfg.data.held_out}: is the training split; name another")
        fit = Probed.of(training, evaluate_codes(model, training, cfg.pairs))
        numbers["probe"] = probe(fit, Probed.of(data, seen), actions, codes, seed=cfg.seed)
    prepare_output(output, overwrite=cfg.overwrite)
    if isinstance(data, PairDataset):
        moved = transfer(model, data)
        numbers["transfer_cosine"] = moved.same_direction()
        draw_transfer(moved, output / "transfer.png")
    write_file(output / "health.json", json.dumps(numbers, indent=1))
    draw_gallery(seen, codes, output / "gallery.png")
    report(numbers, codes)


if __name__ == "__main__":
    main()
