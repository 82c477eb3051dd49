"""Predicted over recorded actions: how far apart they lie, and what of it looks like a matter of conventions.

Conventions (a sign, a unit, an order, the time of a step) leave patterns that a badly trained policy does not
leave: a warning needs a pattern that is strong, and too strong for chance. NumPy alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from defi.data.motions import Statistics
from defi.robot.spec import NOISE, RARE, Robot, Vector

LEAST, SURE = 0.3, 3.0  # a correlation counts from here on, and from so many of its standard errors
OPPOSITE = -0.7  # a correlation that is worth a hint before it is sure
APART = 0.3  # correlations: so much more with another dimension than each of both has with its own
FACTOR, HUGE = 2.0, 10.0  # of size: where predictions follow what was recorded, and where they do not
BETTER, CLEARLY = 0.92, 3.0  # another reading's squared error as a share of the first's; standard errors
FEW_LOOKS = "too few looks to tell"
FEWEST = 8  # looks, or more, before readings are compared
MARGIN, RARELY = 0.1, 0.01  # beyond the training data's range, as a share of it; share of steps that may be
FEW = 3  # of the dimensions outside the training range are described, the others named
UNITS = {1000.0: "millimetres, metres", 180 / np.pi: "degrees, radians", 100.0: "centimetres, metres"}


@dataclass(frozen=True)
class Laid:
    """An episode's recorded actions, and what the policy said at some of its steps, in the robot's units.

    positions: steps at which it looked, the first is 0; chunks: what it said there, which reaches to the
    next look at least, and may reach beyond the episode's end.
    """

    name: str
    recorded: Float[np.ndarray, "T A"]
    positions: Int[np.ndarray, " L"]
    chunks: Float[np.ndarray, "L K A"]

    @cached_property
    def look(self) -> Int[np.ndarray, " T"]:
        """The number of the last look before or at each step."""
        return np.searchsorted(self.positions, np.arange(len(self.recorded)), side="right") - 1

    @cached_property
    def predicted(self) -> Float[np.ndarray, "T A"]:
        """What would have been carried out: of each chunk the actions before the next look."""
        return self.chunks[self.look, np.arange(len(self.recorded)) - self.positions[self.look]]

    def targets(self) -> Float[np.ndarray, "L K A"]:
        """What was recorded where the chunks lie; NaN beyond the episode's end."""
        steps, end = self.positions[:, None] + np.arange(self.chunks.shape[1]), len(self.recorded)
        return np.where((steps < end)[..., None], self.recorded[np.minimum(steps, end - 1)], np.nan)


class OpenLoop:
    """Episodes laid over each other.

    Args:
        robot: the policy's.
        usual: of the actions of the whole data set.
    """

    def __init__(self, robot: Robot, episodes: Sequence[Laid], usual: Statistics) -> None:
        self.robot, self.episodes, self.usual, self.names = robot, episodes, usual, robot.actions.names
        self.chunks = np.concatenate([each.chunks for each in episodes]).astype(float)
        self.targets = np.concatenate([each.targets() for each in episodes])
        self.predicted = np.concatenate([each.predicted for each in episodes]).astype(float)
        self.recorded = np.concatenate([each.recorded for each in episodes]).astype(float)
        span, whole = usual.high - usual.low, usual.maximum - usual.minimum
        span = np.where(span <= RARE * whole, whole, span)  # it moves in few frames
        moves = (span > NOISE * np.abs(usual.mean)) & (np.ptp(self.recorded, axis=0) > 0)
        self.span = np.where(moves, span, np.nan)  # 1 % … 99 % of what was recorded
        dimension = robot.gripper.dimension if robot.gripper else -1
        self.arm: Bool[np.ndarray, " A"] = moves & (np.arange(len(span)) != dimension)

    # ------------------------------------------------------------ how far apart

    def errors(self) -> dict[str, Any]:
        """Of each dimension, of the places in the chunk, of baselines, of the gripper; for results.json.

        `of_range`: as a share of the range 1 % … 99 % of what was recorded, NaN where that never changes;
        over several dimensions the mean, without the gripper. size: how many times as much predictions vary.
        Baselines, which act at the same looks: mean_action, and last_action, that before the look.
        """
        before = [np.vstack([self.usual.mean, e.recorded[e.positions[1:] - 1]]) for e in self.episodes]
        held = np.concatenate([last[e.look] for last, e in zip(before, self.episodes)])
        said = {"policy": self.predicted, "mean_action": self.usual.mean, "last_action": held}
        rmse = {name: _root(each - self.recorded, 0) for name, each in said.items()}
        mae = np.abs(self.predicted - self.recorded).mean(0)
        columns = {
            "rmse": rmse["policy"], "mae": mae, "rmse_of_range": rmse["policy"] / self.span,
            "mae_of_range": mae / self.span, "correlation": self.correlations.diagonal(), "size": self.sizes,
            "mean_action_rmse": rmse["mean_action"], "last_action_rmse": rmse["last_action"],
        }  # fmt: skip
        chunks = {"policy": self.chunks, "mean_action": self.usual.mean}
        chunks["last_action"] = np.concatenate(before)[:, None]
        apart = {name: ((each - self.targets) / self.span)[..., self.arm] for name, each in chunks.items()}
        return {
            "dimensions": [
                {"name": name, "unit": unit} | {key: float(column[i]) for key, column in columns.items()}
                for i, (name, unit) in enumerate(zip(self.names, self.robot.actions.units))
            ],
            "of_range": {
                name: float((each / self.span)[self.arm].mean()) if self.arm.any() else np.nan
                for name, each in rmse.items()
            },
            "places": {
                name: _root(each, 0).mean(1).tolist() if self.arm.any() else []
                for name, each in apart.items()
            },
            "gripper": self.gripper,
        }

    @cached_property
    def correlations(self) -> Float[np.ndarray, "A A"]:
        """Of predicted (rows) and recorded (columns); NaN where one never changes."""
        return _standard(self.predicted).T @ _standard(self.recorded) / len(self.recorded)

    @cached_property
    def sizes(self) -> Float[np.ndarray, " A"]:
        """How many times as much the predictions vary as what was recorded."""
        return self.predicted.std(0) / np.where(np.isnan(self.span), np.nan, self.recorded.std(0))

    @cached_property
    def worth(self) -> Float[np.ndarray, "A A"]:
        """As many independent steps would say as much: of predicted (rows) and recorded (columns), two series
        that change as slowly as these (Bartlett 1935)."""
        kept = np.ones(len(self.recorded) - 1, bool)
        kept[np.cumsum([len(each.recorded) for each in self.episodes])[:-1] - 1] = False
        series = (_standard(self.predicted), _standard(self.recorded))
        both = np.outer(*((each[1:] * each[:-1])[kept].mean(0).clip(0, 0.999) for each in series))
        return len(self.recorded) * (1 - both) / (1 + both)

    @cached_property
    def strong(self) -> Bool[np.ndarray, "A A"]:
        """Which correlations are no chance."""
        found = np.abs(self.correlations)
        return (found >= LEAST) & (found * np.sqrt(self.worth) >= SURE)

    @cached_property
    def gripper(self) -> dict[str, Any] | None:
        """Shares of steps with the same command and with the opposite one; switches, and by how many steps
        the predicted ones come late (median) and lie off (mean). None without a gripper."""
        if (spec := self.robot.gripper) is None:
            return None
        same, opposite, late, counts = [], [], [], np.zeros(2, int)
        for each in self.episodes:
            said, true = (spec.snap(values)[:, spec.dimension] for values in (each.predicted, each.recorded))
            same.append(said == true)
            opposite.append((said != true) & (said != 0) & (true != 0))  # 0: `held`, before the first command
            mine, its = (np.flatnonzero(np.diff(series)) + 1 for series in (said, true))
            counts += len(mine), len(its)
            for step in its:
                away = mine[said[mine] == true[step]] - step
                if len(away) and np.abs(away).min() <= each.chunks.shape[1]:
                    late.append(int(away[np.abs(away).argmin()]))
        shares = {"agreement": same, "opposite": opposite}
        return {
            **{name: float(np.concatenate(found).mean()) for name, found in shares.items()},
            "switches": {"predicted": int(counts[0]), "recorded": int(counts[1]), "found": len(late)},
            "late": float(np.median(late)) if late else None,
            "off": float(np.abs(late).mean()) if late else None,
        }

    # ------------------------------------------------------------ conventions

    def warnings(self) -> list[str]:
        """A line for each thing that looks like a convention which the policy and the data do not share."""
        found = [*self._dimensions(), *self._gripper(), *self._time()]
        found += out_of_range("recorded action", self.robot.actions, self.recorded)
        return found + list(out_of_range("predicted action", self.robot.actions, self.predicted))

    def hints(self) -> list[str]:
        """Signs that look flipped, though it may be chance: over several episodes, and within them too."""
        if len(self.episodes) < 2:
            return []
        pairs = [(each.predicted, each.recorded) for each in self.episodes]
        said, true = (np.concatenate([x - x.mean(0) for x in each]) for each in zip(*pairs))
        own, within = self.correlations.diagonal(), (_standard(said) * _standard(true)).mean(0)
        found = self.arm & ~self.strong.diagonal() & (own < OPPOSITE) & (within < -LEAST)
        what = "looks as if the sign were flipped (correlation {:.2f}); more looks would tell"
        return [f"{self.names[i]}: {what.format(own[i])}" for i in np.flatnonzero(found)]

    def judged(self) -> dict[str, list[str]]:
        """Of which dimensions, and whether of the time, there was enough to go on; and what of the others."""
        known, few, idle, still = [], [], [], []
        for i, name in enumerate(self.names):
            own, enough = abs(self.correlations[i, i]), self.worth[i, i] >= np.square(SURE / LEAST)
            if np.isnan(self.span[i]):
                still.append(name)
            elif self.strong[i, i] or not self.arm[i]:  # a gripper that switches
                known.append(name)
            else:  # a correlation of NaN: the policy says one number
                (idle if np.isnan(own) or (own < LEAST and enough) else few).append(name)
        timed = (self.arm & self.strong.diagonal()).any() and len(self.chunks) >= FEWEST
        (known if timed else few).append("time")
        sorts = {"judged": known, FEW_LOOKS: few, "not followed by the policy": idle}
        return sorts | {"never changes": still}

    def _dimensions(self) -> Iterator[str]:
        known = np.nan_to_num(self.correlations)
        own, deviation = np.abs(known.diagonal()), self.predicted.std(0)
        for i, name in enumerate(self.names):
            best, size, follows = int(np.abs(known[i]).argmax()), self.sizes[i], self.strong[i, i]
            offset = (self.predicted - self.recorded)[:, i].mean()
            if self.strong[i, best] and abs(known[i, best]) > max(own[i], own[best]) + APART:
                found = f"{known[i, best]:.2f}; with the recorded {name} {known[i, i]:.2f}"
                what = f"predictions follow the recorded {self.names[best]} (correlation {found})"
                yield f"{name}: {what}: is the order of the dimensions another?"
            elif not self.arm[i]:
                continue
            elif follows and known[i, i] < 0:
                what = f"predictions go the other way (correlation {known[i, i]:.2f})"
                yield f"{name}: {what}: is the sign flipped?"
            elif follows and not (own[i] * size < FACTOR and size / own[i] > 1 / FACTOR):
                near = [units for ratio, units in UNITS.items() if 0.7 < max(size, 1 / size) / ratio < 1.4]
                what = f"predictions are {size:.3g} times as large as recorded"
                yield f"{name}: {what}: is the unit another{f' ({near[0]})' if near else ''}?"
            elif not follows and not 1 / HUGE < (wide := deviation[i] / self.usual.std[i]) < HUGE:
                what = f"predictions do not follow what is recorded, and vary {wide:.3g} times as much"
                yield f"{name}: {what}: another unit, or nothing learned?"
            elif follows and abs(offset) > self.span[i]:
                what = f"predictions lie {offset:+.4g} from what is recorded on average"
                yield f"{name}: {what}: is its zero another?"

    def _gripper(self) -> Iterator[str]:
        found, spec = self.gripper, self.robot.gripper
        if found is None or spec is None:
            return
        values, (low, high) = self.recorded[:, spec.dimension], sorted((spec.below, spec.above))
        if found["agreement"] < 0.5 and found["opposite"] > found["agreement"] + 0.2:
            shares = f"{found['agreement']:.0%} of the steps, the opposite in {found['opposite']:.0%}"
            yield f"{self.names[spec.dimension]}: as recorded in {shares}: is the gripper inverted?"
        first, last, reach = values.min(), values.max(), 0.25 * (high - low)
        if first < last and max(abs(first - low), abs(last - high)) > reach:
            what = f"recorded from {first:.4g} to {last:.4g}, the policy's are {low:g} and {high:g}"
            yield f"{self.names[spec.dimension]}: {what}: other values for open and closed?"

    def _time(self) -> Iterator[str]:
        """The best other reading of the chunks' time, if it is better than the plain one both for the same
        recorded and for the same predicted actions: what lies further ahead is harder to predict."""
        size, sure = self.chunks.shape[1], self.arm & self.strong.diagonal()
        place, best, said = np.arange(size), BETTER, ""
        readings = {f"{lag} steps later than": place - lag for lag in range(1, size // 2 + 1)}
        readings |= {f"{lag} steps earlier than": place + lag for lag in range(1, size // 2 + 1)}
        for times in (2, 3):
            readings[f"{times} times as fast as"] = place * times
            readings[f"{times} times as slowly as"] = np.where(place % times, -1, place // times)
        for words, read in readings.items():
            fits = (read >= 0) & (read < size) & (read != place)
            if fits.sum() < 2 or not sure.any():
                continue
            predicted, recorded = (
                [each[:, which][..., sure] / self.span[sure] for which in (place[fits], read[fits])]
                for each in (self.chunks, self.targets)
            )
            other = np.square(predicted[1] - recorded[0])
            found = [better(np.square(predicted[i] - recorded[i]), other) for i in range(2)]
            if all(clear and share < BETTER for share, clear in found) and found[0][0] < best:
                best, said = found[0][0], words
        if said:
            what = (
                f"if the recorded actions come {said} the policy's, {best:.0%} of the squared error is left"
            )
            yield f"time: {what}: are they shifted against the pictures, or is the rate another?"


def better(first: Float[np.ndarray, "*shape"], second: Float[np.ndarray, "*shape"]) -> tuple[float, bool]:
    """A second reading's squared error as a share of the first's, of the same looks; whether it is less by
    more than chance. NaN: nothing to compare there."""
    known = ~np.isnan(first + second)
    count = known.reshape(len(known), -1).sum(1)
    sums = [np.where(known, each, 0).reshape(len(known), -1).sum(1) for each in (first, second)]
    one, two = (each[count > 0] / count[count > 0] for each in sums)
    gain = one - two
    sure = len(gain) >= FEWEST and gain.mean() > CLEARLY * gain.std() / np.sqrt(len(gain))
    with np.errstate(divide="ignore", invalid="ignore"):  # a policy without errors
        return float(two.sum() / one.sum()), bool(sure)


def out_of_range(what: str, vector: Vector, values: Float[np.ndarray, "N A"]) -> Iterator[str]:
    """Dimensions that lie outside the training data's range, or a state that stands still where it moved."""
    if not vector.low:
        return
    low, high = np.array(vector.low), np.array(vector.high)
    reach = MARGIN * (high - low) + NOISE * np.maximum(np.abs(low), np.abs(high))
    beyond = ((values < low - reach) | (values > high + reach)).mean(0)
    found = {}
    for i, name in enumerate(vector.names):
        first, last, usual = values[:, i].min(), values[:, i].max(), f"{low[i]:.4g} … {high[i]:.4g}"
        if beyond[i] > RARELY:
            share = f"{beyond[i]:.0%} lie outside"
            found[name] = f"{first:.4g} … {last:.4g}, in training {usual} ({share})"
        elif what == "state" and first == last and low[i] < high[i]:
            found[name] = f"always {first:.4g}, in training {usual}"
    yield from (f"{what} {name}: {said}" for name, said in list(found.items())[:FEW])
    if more := list(found)[FEW:]:
        yield f"{what}: so it is with {len(more)} more, {', '.join(more)}"


def _root(apart: np.ndarray, axis: int) -> np.ndarray:
    """Root of the mean square of what is not NaN."""
    known = ~np.isnan(apart)
    total = np.square(np.where(known, apart, 0)).sum(axis)
    return np.sqrt(total / np.where(known.any(axis), known.sum(axis), np.nan))


def _standard(values: Float[np.ndarray, "N A"]) -> Float[np.ndarray, "N A"]:
    """Mean 0, deviation 1; NaN where it never changes."""
    deviation = np.where(np.ptp(values, axis=0) > NOISE * np.abs(values.mean(0)), values.std(0), np.nan)
    return (values - values.mean(0)) / deviation
