"""Do two evaluations differ by more than chance? `python -m Step3_DeFI.compare outputs/a outputs/b`.

Chain by chain: both policies ran the same sequences from the same states, so the differences per sequence are
compared, which needs far fewer sequences than comparing the two averages.
"""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from defi.config import one_line_errors
from defi.errors import UserError
from Step3_DeFI.rollout.report import text_table
from Step3_DeFI.rollout.results import Results, lengths, paired_difference, read_results

NOTED = ("seed", "chunk", "batch", "sampler", "sampler_steps", "guidance", "precision", "sim")
FEW = 20  # chains; with fewer, a bootstrap knows little of what others would bring


def compare(a: Results, b: Results) -> dict[str, dict[str, Any]]:
    """`results.paired_difference` of b − a at every limit that both have.

    Raises:
        UserError: the two were not measured under the same protocol.
    """
    shared = sorted(set(a.protocol["max_steps"]) & set(b.protocol["max_steps"]))
    for key, first in a.protocol.items():
        second = b.protocol.get(key)
        if first != second and not (key == "max_steps" and shared):
            differ = f"{key}: {first} in the first result, {second} in the second"
            fix = "different protocols cannot be compared; evaluate both with the same settings"
            raise UserError(f"{differ}: {fix}")
    pairs = {limit: (lengths(a.chains, limit), lengths(b.chains, limit)) for limit in shared}
    return {str(limit): paired_difference(*pair) for limit, pair in pairs.items()}


def comparison_table(a: Results, b: Results) -> Table:
    lines = []
    for limit, found in compare(a, b).items():
        averages = (f"{side.limits[limit]['average']:.2f}" for side in (a, b))
        change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(found["difference"], *found["interval"])
        p = f"{found['p']:.2g}" if found["p"] >= 0.001 else "< 0.001"
        lines.append((limit, *averages, change, p, "yes" if found["differs"] else "no"))
    title = f"{len(a.chains)} chains, paired; average lengths, b − a with its 95 % interval"
    return text_table(title, ("steps", "a", "b", "b − a", "p", "beyond chance"), lines)


def remarks(a: Results, b: Results) -> list[str]:
    """What weakens the comparison without forbidding it: few chains, conditions that differ."""
    found = []
    if len(a.chains) < FEW:
        found.append(f"{len(a.chains)} chains only: intervals of so few say little; run {FEW} or more")
    drawn = a.run.get("renderer"), b.run.get("renderer")
    if drawn[0] != drawn[1]:
        found.append(f"renderer differs: {drawn[0]} | {drawn[1]}: they saw other pictures of the same scenes")
    caveats = {"a": a.run.get("caveat"), "b": b.run.get("caveat")}
    found += [f"{name}: {caveat}" for name, caveat in caveats.items() if caveat]
    first, second = ({key: side.run["settings"].get(key) for key in NOTED} for side in (a, b))
    first, second = first | a.run["versions"], second | b.run["versions"]
    found += [
        f"{key} differs: {value} | {second.get(key)}"
        for key, value in first.items()
        if value != second.get(key)
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
