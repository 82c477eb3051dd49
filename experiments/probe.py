"""Linear probes of what the policy sees: `python -m experiments.probe …` (configs/probe.yaml)."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from omegaconf import DictConfig
from rich.console import Console
from sklearn.metrics import r2_score

from defi.config import entry
from defi.data.calvin import INDEX, CalvinData
from defi.engine.output import check_output, prepare_output, write_file
from defi.errors import UserError
from Step2_GIDM.health import fit_and_predict
from Step3_DeFI.rollout.report import text_table
from Step3_DeFI.store import PolicyStore

GRID = {"features": 4, "images": 16}  # places a side that an input is averaged to
OBJECTS = {"doors, lights": [*range(6)], "blocks": [6, 7, 8, 12, 13, 14, 18, 19, 20]}  # in scene_obs
MOVES = 1e-3  # of a target's deviation, below which nothing moves


class Probed(NamedTuple):
    """Samples of a store. inputs, targets: by name, a row per sample; groups: the episode of each."""

    inputs: dict[str, Float[np.ndarray, "N X"]]
    targets: dict[str, Float[np.ndarray, "N Y"]]
    groups: np.ndarray


def read(folder: str, count: int, texts: list[str]) -> Probed:
    """At most `count` samples of a store, evenly spread. texts: the instructions that are told apart."""
    store = PolicyStore(folder)
    if store.kind not in GRID:
        raise UserError(f"{folder}: a store of {store.kind}; give one of features or images")
    taken = np.unique(np.linspace(0, len(store.index) - 1, min(count, len(store.index))).astype(int))
    rows, text, first = store.index[taken].T
    known = np.array([texts.index(each) if each in texts else len(texts) for each in store.texts])
    inputs = {"instruction": np.eye(len(texts) + 1)[known[text]]}
    if store.kind == "features":
        seen = torch.from_numpy(np.stack([store.inputs[row][0] for row in rows]).astype(np.float32))
        side = math.isqrt(seen.shape[3])
        grid = seen.transpose(3, 4).unflatten(4, (side, side))  # N V F C h w
        pooled = F.adaptive_avg_pool2d(grid.flatten(0, 2), GRID["features"]).unflatten(0, grid.shape[:3])
        inputs["features, first frame"] = pooled[:, :, 0].flatten(1).numpy()
        inputs["features, all frames"] = pooled.flatten(1).numpy()
    else:
        seen = torch.from_numpy(np.stack([store.inputs[row] for row in rows]).astype(np.float32) / 255)
        inputs["pixels"] = F.adaptive_avg_pool2d(seen.flatten(1, 2), GRID["images"]).flatten(1).numpy()
    chunks = store.motions.actions[first[:, None] + np.arange(store.chunk)].astype(np.float64)
    relative = np.array(store.robot().actions.relative)
    targets = {"actions": np.where(relative, chunks.sum(1), chunks.mean(1)), **moved(store, first)}
    return Probed(inputs, targets, np.load(store.folder / "starts.npy")[taken, 0])


def moved(store: PolicyStore, first: Int64[np.ndarray, " N"]) -> dict[str, Float[np.ndarray, "N Y"]]:
    """How doors, lights and blocks move over each chunk; nothing where the data are not CALVIN's, or gone."""
    made = store.manifest
    for share in {made.settings.get("share", 1.0), 1.0} if Path(made.source, INDEX).is_file() else ():
        data = CalvinData(Path(made.source), {}, made.settings.get("spans") or "annotated", share)
        if data.fingerprint == made.fingerprint:
            frames = data.motions.frames[[first, first + store.chunk - 1]]
            seen = {n: data.files.frame(n, ("scene_obs",))["scene_obs"] for n in np.unique(frames).tolist()}
            change = np.stack([seen[later] - seen[now] for now, later in frames.T.tolist()])
            return {name: change[:, places] for name, places in OBJECTS.items()}
    return {}


def probe(fit: Probed, test: Probed) -> dict[str, dict[str, float | None]]:
    """Input → target → R² on `test`, each number in units of its deviation; None where nothing varies."""
    found: dict[str, dict[str, float | None]] = {name: {} for name in fit.inputs}
    for target in fit.targets.keys() & test.targets.keys():
        a, b = fit.targets[target], test.targets[target]
        varies = (a.std(0) > MOVES) & (b.std(0) > MOVES)
        a, b = (part[:, varies] / a[:, varies].std(0) for part in (a, b))
        for name, x in fit.inputs.items():
            guess = fit_and_predict(x, a, test.inputs[name], groups=fit.groups) if varies.any() else None
            found[name][target] = (
                None if guess is None else float(r2_score(b, guess, multioutput="variance_weighted"))
            )
    return found


@entry("probe")
def main(cfg: DictConfig) -> None:
    output = check_output(cfg.output, overwrite=cfg.overwrite)
    if not cfg.stores or any(len(pair) != 2 for pair in cfg.stores.values()):
        raise UserError("stores: give '+stores.<name>=[<store>,<held-out store>]', one or more")
    found = {}
    for name, (training, held_out) in cfg.stores.items():
        texts = PolicyStore(training).texts
        found[name] = probe(*(read(each, cfg.samples, texts) for each in (training, held_out)))
    prepare_output(output, overwrite=cfg.overwrite)
    write_file(output / "probe.json", json.dumps(found, indent=1))
    targets = sorted({target for each in found.values() for scores in each.values() for target in scores})
    lines = [
        (name, given, *("—" if scores.get(t) is None else f"{scores[t]:.2f}" for t in targets))
        for name, inputs in found.items()
        for given, scores in inputs.items()
    ]
    title = "R² on held-out samples of what a linear probe reads"
    Console(highlight=False).print(text_table(title, ("store", "from", *targets), lines))


if __name__ == "__main__":
    main()
