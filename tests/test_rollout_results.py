"""What is said about chains: averages, intervals, comparisons, files and the page."""

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from rich.console import Console
from rollout_fakes import fake_evaluation

from defi.benchmarks.calvin.benchmark import Calvin
from defi.benchmarks.statistics import Summary, mean_interval, paired_difference
from defi.errors import UserError
from Step3_DeFI.compare import compare, comparison_table, remarks
from Step3_DeFI.quickstart import SMOKE, remark
from Step3_DeFI.rollout.report import choose_videos, result_table, task_table, write_report
from Step3_DeFI.rollout.results import EpisodeLog, Results, read_results, running_average, versions
from Step3_DeFI.rollout.simulator import EpisodeResult

TASKS = ("open_drawer", "close_drawer", "turn_on_led", "lift_red_block_table", "push_blue_block_left")


def chain(index: int, *steps: int | None) -> EpisodeResult:
    outcome = {"tasks": list(TASKS), "steps": list(steps)}
    return EpisodeResult(index, outcome, control_steps=100, observations=10, seconds=1.0)


def lengths(chains: Sequence[EpisodeResult], limit: int) -> list[int]:
    return [Calvin().value(chain.outcome, str(limit)) for chain in chains]


def summarise(chains: Sequence[EpisodeResult], limit: int) -> Summary:
    return Calvin().summarise([chain.outcome for chain in chains], str(limit))


CHAINS = (
    chain(0, 10, 20, 30, 40, 50),
    chain(1, 100, 400, 20, None),
    chain(2, None),
    chain(3, 360, 361, None),
)


def results(chains: tuple[EpisodeResult, ...] = CHAINS, **protocol: object) -> Results:
    evaluation = fake_evaluation(chains=len(chains), max_steps=[360, 720])
    protocol = evaluation.protocol | protocol
    limits = protocol["max_steps"]
    return Results(
        about=Calvin().about(protocol, 0),
        policy={"kind": "policy", "checkpoint": "outputs/<policy>", "fingerprint": "abc"},
        protocol=protocol,
        run={
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 75.0,
            "earlier_chains": 0,
            "control_steps": 1000,
            "observations": 100,
            "renderer": "none",
            "settings": evaluation.settings,
            "versions": versions(),
        },
        episodes=chains,
        scores={str(limit): summarise(chains, limit) for limit in limits},
        baseline={
            "agent": "random",
            "scores": {str(limit): summarise([chain(i, None) for i in range(4)], limit) for limit in limits},
            "episodes": [],
        },
    )


# ---------------------------------------------------------------- numbers


def test_length_is_the_leading_tasks_within_the_limit():
    assert lengths(CHAINS, 720) == [5, 3, 0, 2]
    assert lengths(CHAINS, 360) == [5, 1, 0, 1]
    assert lengths([chain(0, 10, None, 10)], 720) == [1]


def test_summary_of_chains_by_hand():
    found = summarise(CHAINS, 360)
    assert found["average"] == 7 / 4
    assert [success["rate"] for success in found["success"]] == [0.75, 0.25, 0.25, 0.25, 0.25]
    counts = found["tasks"]
    assert counts["open_drawer"] == {"solved": 3, "tried": 4}
    assert counts["close_drawer"] == {"solved": 1, "tried": 3}  # two of them solved too late
    assert counts["turn_on_led"] == {"solved": 1, "tried": 1}
    assert sum(count["solved"] for count in counts.values()) == 7


def test_rate_intervals_are_wilsons():
    first, *_ = summarise([chain(i, 10 if i < 8 else None, None) for i in range(10)], 360)["success"]
    assert first["interval"] == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    low, high = summarise([chain(i, None) for i in range(60)], 360)["success"][0]["interval"]
    assert low == 0 and high == pytest.approx(1.959964**2 / (60 + 1.959964**2), abs=1e-6)


def test_mean_interval_agrees_with_the_normal_one_on_many_chains():
    values = np.random.default_rng(3).integers(0, 6, 1000)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert mean_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(np.array([2, 2, 2])) == (2, 2)


def test_mean_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    chances = np.array([0.3, 0.25, 0.15, 0.1, 0.1, 0.1])
    truth = chances @ np.arange(6)
    hits = 0
    for _ in range(80):
        low, high = mean_interval(rng.choice(6, size=60, p=chances))
        hits += low <= truth <= high
    assert 70 <= hits <= 80


def test_paired_difference_against_all_sign_flips():
    a, b = np.array([0, 1, 2, 3, 1, 0, 2, 2]), np.array([1, 3, 2, 5, 1, 1, 4, 1])
    change = b - a
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    exact = np.mean(np.abs(signs @ change) >= abs(change.sum()))
    found = paired_difference(a, b)
    assert found["difference"] == change.mean()
    assert found["p"] == pytest.approx(exact, abs=0.01)


def test_paired_difference_of_equal_policies_is_chance():
    rng = np.random.default_rng(1)
    assert paired_difference(np.ones(5, int), np.ones(5, int))["p"] == 1
    found = [paired_difference(rng.integers(0, 6, 80), rng.integers(0, 6, 80))["differs"] for _ in range(40)]
    assert np.mean(found) < 0.15
    better = rng.integers(0, 5, 80)
    assert paired_difference(better, better + (rng.random(80) < 0.3))["differs"]


def test_running_average():
    full, none = chain(0, *[10] * 5), chain(0, None)
    about = results().about
    assert running_average(lengths([chain(0, 10, 10, None)], 360), about) == "average length 2.00"
    assert running_average(lengths([none, full, none, full], 360), about) == "average length 2.50 ± 2.83"


# ---------------------------------------------------------------- files


def test_results_are_read_back_as_written(tmp_path):
    written = results()
    written.save(tmp_path / "results.json")
    for place in (tmp_path, tmp_path / "results.json"):
        read = read_results(place)
        assert read.episodes == written.episodes
        assert json.loads(json.dumps(asdict(read))) == json.loads(json.dumps(asdict(written)))
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["limits"]["360"]["average"] == 1.75 and data["limits"]["720"]["average"] == 2.5


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "missing; give the output folder of a finished rollout"),
        ("{", "cannot be read (Expecting property name"),
        ("[]", "cannot be read ('list' object has no attribute 'get')"),
        ('{"format": 99}', "cannot be read (format 99, this version reads 1)"),
        ('{"format": 1, "chains": []}', "cannot be read (no 'policy' in it)"),
    ],
)
def test_files_that_are_no_results(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=f"results.json: .*{re.escape(message)}"):
        read_results(tmp_path)


def test_an_unfinished_run_is_not_a_wrong_folder(tmp_path):
    EpisodeLog(tmp_path, "chains").append(CHAINS[0])
    (tmp_path / "rollout.json").touch()
    with pytest.raises(UserError, match="unfinished; continue it with resume=true"):
        read_results(tmp_path)


def test_results_of_earlier_versions_are_read(tmp_path):
    """They did not name their benchmark, and had fewer numbers; what is `observations` was `looks`."""
    written = results()
    written = replace(written, baseline=written.baseline | {"episodes": [asdict(chain(0, None))["outcome"]]})
    written.save(tmp_path / "results.json")
    values = json.loads((tmp_path / "results.json").read_text())
    del values["benchmark"]
    for summary in (*values["limits"].values(), *values["baseline"]["limits"].values()):
        del summary["values"]
    text = json.dumps(values).replace('"observations"', '"looks"')
    (tmp_path / "results.json").write_text(text)
    read = read_results(tmp_path)
    assert read.episodes == written.episodes and compare(read, written)["720"]["difference"] == 0
    assert (read.about, json.dumps(read.scores)) == (written.about, json.dumps(written.scores))
    write_report(tmp_path / "report.html", read, tmp_path)


def test_chain_log_survives_a_cut_line(tmp_path):
    log = EpisodeLog(tmp_path, "chains")
    log.append(CHAINS[0])
    with log.path.open("a") as file:
        file.write('{"index": 1, "ta')
    assert list(log.read()) == [0]
    log.append(CHAINS[1])
    assert log.read() == {0: CHAINS[0], 1: CHAINS[1]}


# ---------------------------------------------------------------- comparison


def test_comparison_of_a_clearly_better_policy(tmp_path):
    worse = results(tuple(chain(i, 10, None) for i in range(20)))
    better = results(tuple(chain(i, 10, 20, None) if i % 4 else chain(i, None) for i in range(20)))
    found = compare(worse, better)
    assert set(found) == {"360", "720"}
    assert found["720"]["difference"] == 0.5 and found["720"]["differs"]
    worse.save(tmp_path / "a.json")
    better.save(tmp_path / "b.json")
    command = [sys.executable, "-m", "Step3_DeFI.compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "80"})
    assert done.returncode == 0 and "+0.50" in done.stdout and "yes" in done.stdout
    assert f"\na: {tmp_path / 'a.json'}\nb: {tmp_path / 'b.json'}\n" in done.stdout


def test_comparison_of_different_protocols_is_refused():
    with pytest.raises(UserError, match="sequence_hash: .* different protocols cannot be compared"):
        compare(results(), results(sequence_hash="other"))
    with pytest.raises(UserError, match="world: fresh in the first result, persistent in the second"):
        compare(results(), results(world="persistent"))


def test_comparison_needs_one_shared_limit():
    assert set(compare(results(), results(max_steps=[720]))) == {"720"}
    with pytest.raises(UserError, match="max_steps"):
        compare(results(), results(max_steps=[100]))


def test_comparison_says_what_else_differs():
    one = results(tuple(chain(i, None) for i in range(20)))
    other = replace(
        one, run=one.run | {"renderer": "another", "settings": one.run["settings"] | {"chunk": 5}}
    )
    assert remarks(one, one) == ["both results are of the same weights"]
    other = replace(other, policy=one.policy | {"fingerprint": "def"})
    saw_others, chunk = remarks(one, other)
    assert saw_others.startswith("renderer differs: none | another") and "other pictures" in saw_others
    assert chunk == "chunk differs: None | 5"


def test_a_number_that_compares_with_no_published_one_says_so(tmp_path):
    one = results(tuple(chain(i, None) for i in range(20)), assets="calvin", sequences="official", scene="D")
    other = replace(one, run=one.run | {"caveat": "drawn <otherwise>"})
    assert "b: drawn <otherwise>" in remarks(one, other) and "a: drawn <otherwise>" in remarks(other, one)
    text = write_report(tmp_path / "report.html", other, tmp_path).read_text()
    assert "drawn &lt;otherwise&gt;" in text and "FLOWER" not in text


def test_comparison_of_few_chains_says_so():
    few = results(tuple(chain(i, None) for i in range(19)))
    assert remarks(few, few)[0] == "19 chains only: intervals of so few say little; run 20 or more"


def test_comparison_command_ends_in_one_line(tmp_path):
    command = [sys.executable, "-m", "Step3_DeFI.compare", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


# ---------------------------------------------------------------- for people


def printed(table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_tables_show_both_limits_and_the_baseline():
    text = printed(result_table(results()))
    assert re.search(r"DeFI +360 +1\.75 \[", text) and re.search(r"DeFI +720 +2\.50 \[", text)
    assert re.search(r"random actions +720 +0\.00", text)
    assert re.search(r"open_drawer +3 +4 +75%", printed(task_table(results())))
    assert "+0.00" in printed(comparison_table(results(), results()))


def test_report_holds_numbers_and_escapes_text(tmp_path):
    text = write_report(tmp_path / "report.html", results(), tmp_path).read_text()
    assert "2.50" in text and "outputs/&lt;policy&gt;" in text and "<policy>" not in text
    assert "3 of 4" in text  # open_drawer
    assert "FLOWER" not in text and "published numbers do not compare" in text


def test_published_methods_stand_beside_the_official_protocol_only(tmp_path):
    official = results(assets="calvin", sequences="official", scene="D")
    text = write_report(tmp_path / "report.html", official, tmp_path).read_text()
    order = [text.index(f"<td>{name}</td>") for name in ("FLOWER", "VPP", "GR-1")]
    assert order == sorted(order) and "arXiv 2604.16391" in text
    assert "FLOWER" not in write_report(tmp_path / "b.html", results(scene="A"), tmp_path).read_text()


def test_videos_are_chosen_over_tasks(tmp_path):
    for i, task in enumerate("aaaaaabbcc"):
        (tmp_path / f"{i:04d}_1_{'failed' if i % 2 else 'solved'}_move_{task}.mp4").touch()
    chosen = choose_videos(tmp_path, "solved", 4, "chain")
    assert [path.name[:4] for path in chosen] == ["0000", "0006", "0008", "0002"]
    assert list(chosen.values())[1] == "move_b: chain 6, task 1"
    (tmp_path / "0012_10_solved_move_d.mp4").touch()  # of a long chain
    assert "move_d: chain 12, task 10" in choose_videos(tmp_path, "solved", 5, "chain").values()


@pytest.mark.parametrize(("size", "words"), [("smoke\n", SMOKE), ("short\n", ""), (None, "")])
def test_a_smoke_quickstart_says_that_it_learns_nothing(tmp_path, size, words):
    if size:
        (tmp_path / "size").write_text(size)
    assert remark(tmp_path) == words
