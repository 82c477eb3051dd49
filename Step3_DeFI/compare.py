"""Do two evaluations differ by more than chance? `python -m Step3_DeFI.compare outputs/a outputs/b`.

Chain by chain: both policies ran the same sequences from the same states, so the differences per sequence are
compared, which needs far fewer sequences than comparing the two averages.
"""

import argparse
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from defi.config import one_line_errors
from defi.errors import UserError
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
        if first != b.protocol[key] and not (key == "max_steps" and shared):
            raise UserError(
                f"{key}: {first} in the first result, {b.protocol[key]} in the second: different protocols "
                "cannot be compared; evaluate both with the same settings"
            )
    return {
        str(limit): paired_difference(lengths(a.chains, limit), lengths(b.chains, limit)) for limit in shared
    }


def comparison_table(a: Results, b: Results) -> Table:
    title = f"{len(a.chains)} chains, paired; average lengths, b − a with its 95 % interval"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column in ("steps", "a", "b", "b − a", "p", "beyond chance"):
        table.add_column(column, justify="right", no_wrap=True)
    for limit, found in compare(a, b).items():
        averages = (f"{side.limits[limit]['average']:.2f}" for side in (a, b))
        change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(found["difference"], *found["interval"])
        p = f"{found['p']:.2g}" if found["p"] >= 0.001 else "< 0.001"
        table.add_row(limit, *averages, change, p, "yes" if found["differs"] else "no")
    return table


def remarks(a: Results, b: Results) -> list[str]:
    """What weakens the comparison without forbidding it: few chains, conditions that differ."""
    found = []
    if len(a.chains) < FEW:
        found.append(f"{len(a.chains)} chains only: intervals of so few say little; run {FEW} or more")
    drawn = a.run.get("renderer"), b.run.get("renderer")
    if drawn[0] != drawn[1]:
        found.append(f"renderer differs: {drawn[0]} | {drawn[1]}: they saw other pictures of the same scenes")
    found += [
        f"{name}: {side.run['caveat']}" for name, side in (("a", a), ("b", b)) if side.run.get("caveat")
    ]
    pairs = [(key, a.run["settings"].get(key), b.run["settings"].get(key)) for key in NOTED]
    pairs += [(key, version, b.run["versions"].get(key)) for key, version in a.run["versions"].items()]
    found += [f"{key} differs: {first} | {second}" for key, first, second in pairs if first != second]
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
