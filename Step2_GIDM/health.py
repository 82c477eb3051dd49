"""Do the codes mean anything? `python -m Step2_GIDM.health …` (configs/step2_health.yaml).

Three questions, on held-out pairs. Are the codes used (perplexity, dead codes)? Does the decoder read them
(its error with the right latent action against another pair's)? Do they name what a robot did (linear probe
from codes to actions, beside the same probe from random codes and from differences of DINO features)?
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from defi.config import entry
from defi.engine.checkpoint import find_weights
from defi.engine.output import check_output, prepare_output, write_file
from Step2_GIDM.data.build import held_out_pairs
from Step2_GIDM.data.calvin import CalvinClips
from Step2_GIDM.data.pairs import PairDataset
from Step2_GIDM.gallery import draw_gallery
from Step2_GIDM.model import GIDM
from Step2_GIDM.observe import Observed, observe
from Step2_GIDM.probe import one_hot, probe_r2

ACTIONS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


def actions_between(data: PairDataset, seen: Observed) -> Float[np.ndarray, "N 7"]:
    """What the robot did between the frames of each pair: summed relative motion, mean gripper command."""
    source = data.source
    assert isinstance(source, CalvinClips)

    @cache
    def of_clip(start: int, length: int) -> np.ndarray:
        return source.data.stack("rel_actions", range(start, start + length))

    rows = []
    for pair in seen.pairs:
        clip, now = data.locate(int(pair))
        actions = of_clip(clip.start, clip.length)[now : min(now + seen.distance, clip.length - 1)]
        rows.append([*actions[:, :6].sum(0), actions[:, 6].mean()])
    return np.array(rows)


def probe(data: PairDataset, seen: Observed, codes: int, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """R² per action, and their `mean`, of ridge regression from codes, random codes and feature differences.

    Fitted on every other clip, tested on the rest, so that no clip is on both sides. Actions that never vary
    are left out.
    """
    targets = actions_between(data, seen)
    numbers = {clip: number for number, clip in enumerate(data.source.clips)}
    clips = np.array([numbers[data.locate(int(pair))[0]] for pair in seen.pairs])
    test = clips % 2 == 1
    indices = seen.indices.numpy()
    inputs = {
        "codes": one_hot(indices, codes),
        "random codes": one_hot(np.random.default_rng(seed).integers(codes, size=indices.shape), codes),
        "feature differences": seen.difference.double().numpy(),
    }
    result = {}
    for name, x in inputs.items():
        scores = probe_r2(x, targets, clips, test)
        known = {action: float(score) for action, score in zip(ACTIONS, scores) if np.isfinite(score)}
        result[name] = known | {"mean": sum(known.values()) / max(1, len(known))}
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
    if "probe" in numbers:
        table = Table("R²", "mean", *ACTIONS, title="robot actions read linearly from")
        for name, scores in numbers["probe"].items():
            table.add_row(name, *(f"{scores.get(key, float('nan')):.2f}" for key in ("mean", *ACTIONS)))
        console.print(table)


@entry("step2_health")
def main(cfg: DictConfig) -> None:
    output = check_output(cfg.output, overwrite=cfg.overwrite)
    model = GIDM.from_pretrained(find_weights(Path(cfg.checkpoint), stage="gidm"))
    data = held_out_pairs(cfg.data, model.config.dino.image_size)
    seen = observe(model, data, cfg.pairs)
    codes = model.config.codes
    numbers: dict[str, Any] = seen.numbers(codes)
    if isinstance(data.source, CalvinClips):
        numbers["probe"] = probe(data, seen, codes, seed=cfg.seed)
    prepare_output(output, overwrite=cfg.overwrite)
    write_file(output / "health.json", json.dumps(numbers, indent=1))
    draw_gallery(seen, codes, output / "gallery.png")
    report(numbers, codes)


if __name__ == "__main__":
    main()
