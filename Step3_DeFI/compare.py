"""Do two evaluations differ by more than chance? `python -m Step3_DeFI.compare outputs/a outputs/b`.

Episode by episode: both policies ran the same ones from the same states, so the differences per episode are
compared, which needs far fewer of them than comparing the two averages.
"""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from defi.benchmarks.statistics import paired_difference
from defi.config import one_line_errors
from defi.errors import UserError
from Step3_DeFI.rollout.report import text_table
from Step3_DeFI.rollout.results import HOWEVER_DONE, Results, read_results

FEW = 20  # episodes; with fewer, a bootstrap knows little of what others would bring


def compare(a: Results, b: Results) -> dict[str, dict[str, Any]]:
    """`paired_difference` of b − a by every score that both have.

    Raises:
        UserError: the two were not measured under the same protocol.
    """
    shared = [score for score in a.scores if score in b.scores]
    for key, first in {"benchmark": a.about.benchmark, **a.protocol}.items():
        second = b.about.benchmark if key == "benchmark" else b.protocol.get(key)
        if first != second and not (key == a.about.several and shared):
            differ = f"{key}: {first} in the first result, {second} in the second"
            fix = "different protocols cannot be compared; evaluate both with the same settings"
            raise UserError(f"{differ}: {fix}")
    values = [(a.scores[score]["values"], b.scores[score]["values"]) for score in shared]
    return {score: paired_difference(*pair) for score, pair in zip(shared, values)}


def comparison_table(a: Results, b: Results) -> Table:
    lines, about = [], a.about
    for score, found in compare(a, b).items():
        averages = (about.number(side.scores[score]["average"], score) for side in (a, b))
        change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(found["difference"], *found["interval"])
        p = f"{found['p']:.2g}" if found["p"] >= 0.001 else "< 0.001"
        lines.append((score, *averages, change, p, "yes" if found["differs"] else "no"))
    title = f"{len(a.episodes)} {about.episodes}, paired; {about.figure}s, b − a with its 95 % interval"
    return text_table(title, (about.score, "a", "b", "b − a", "p", "beyond chance"), lines)


def remarks(a: Results, b: Results) -> list[str]:
    """What weakens the comparison without forbidding it: few chains, conditions that differ."""
    found = []
    if len(a.episodes) < FEW:
        few = f"{len(a.episodes)} {a.about.episodes} only"
        found.append(f"{few}: intervals of so few say little; run {FEW} or more")
    drawn = a.run.get("renderer"), b.run.get("renderer")
    if drawn[0] != drawn[1]:
        found.append(f"renderer differs: {drawn[0]} | {drawn[1]}: they saw other pictures of the same scenes")
    caveats = {"a": a.run.get("caveat"), "b": b.run.get("caveat")}
    found += [f"{name}: {caveat}" for name, caveat in caveats.items() if caveat]
    first, second = (side.run["settings"] | side.run["versions"] for side in (a, b))
    compared = HOWEVER_DONE | a.protocol.keys()
    found += [
        f"{key} differs: {value} | {second[key]}"
        for key, value in first.items()
        if key not in compared and value != second.get(key, value)
    ]
    if a.policy.get("fingerprint") == b.policy.get("fingerprint") is not None:
        found.append("both results are of the same weights")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m Step3_DeFI.compare", description=__doc__)
    parser.add_argument("a", help="results.json, or the output folder of a rollout")
    parser.add_argument("b", help="the same of the other")
    paths = parser.parse_args()
    with one_line_errors():
        a, b = read_results(paths.a), read_results(paths.b)
        table = comparison_table(a, b)
    console = Console(highlight=False)
    console.print(table)
    for line in (f"a: {paths.a}", f"b: {paths.b}", *remarks(a, b)):
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
