"""Figures: that what they draw is what was measured, and what is told when they cannot be drawn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

from specdec.bench import figures, sweep_figures
from specdec.bench.grid import Grid
from specdec.bench.results import read_results, read_steps
from specdec.bench.slot_figure import slot_map, slot_shares
from specdec.bench.sweep import run_sweep
from specdec.bench.sweep_figures import draw_sweep, pool_seeds
from specdec.cost import PassCost
from specdec.errors import ConfigError
from specdec.stats import Counts

pytest.importorskip("matplotlib")

COST = PassCost((1, 8, 64), (16, 64), ((1.0, 1.5, 4.0), (1.2, 1.8, 5.0)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over budgets, temperatures, drafters and seeds, plain decoding among them."""
    folder: Path = tmp_path_factory.mktemp("figures")
    tiny.make_model("llama").save_pretrained(folder / "model")
    tiny.letters().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("abcabcab\nbcabbca\n")
    axes = {
        "models": str(folder / "model"),
        "prompts": str(folder / "prompts.txt"),
        "drafters": ["token_recycling", "prompt_lookup", "none"],
        "policies": "best_first",
        "verifiers": "coupled",
        "temperatures": [0, 1],
        "node_budgets": [2, 8],
        "seeds": [0, 1],
        "max_new_tokens": 12,
    }
    run_sweep(Grid.from_mapping(axes), folder / "sweep", progress=False)
    return folder / "sweep"


def counts_of(*lengths: int) -> Counts:
    """Counts of a chain of three guesses a step, of which so many were accepted."""
    counts = Counts()
    counts.target_calls, counts.num_accepted = len(lengths), sum(lengths)
    counts.num_emitted = sum(lengths) + len(lengths)
    counts.accepted_by_depth = [sum(n > depth for n in lengths) for depth in range(3)]
    counts.tested_by_depth = [sum(n >= depth for n in lengths) for depth in range(3)]
    counts.acceptance_histogram = np.bincount(lengths).tolist()
    return counts


# ---- counts ----


def test_acceptance_by_depth_draws_shares_of_the_tested() -> None:
    lengths = [0] * 10 + [1] * 20 + [2] * 6 + [3] * 4
    figure = figures.acceptance_by_depth({"a": counts_of(*lengths), "b": counts_of(*[3] * 12)})
    left, right = figure.axes
    assert left.lines[0].get_ydata() == pytest.approx([30 / 40, 10 / 30, 4 / 10])
    assert right.lines[0].get_ydata() == pytest.approx([30 / 40, 10 / 40, 4 / 40])
    assert left.lines[1].get_ydata() == pytest.approx([1, 1, 1])


def test_few_tested_steps_are_not_drawn() -> None:
    figure = figures.acceptance_by_depth({"a": counts_of(*[0] * 20, *[1] * 9)})
    assert len(figure.axes[0].lines[0].get_ydata()) == 1


def test_a_histogram_draws_shares_of_all_steps() -> None:
    figure = figures.accepted_lengths({"a": counts_of(0, 0, 1, 3)}, longest=2)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([0.5, 0.25, 0.25])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][-1] == "2+"


def test_the_front_is_what_nothing_beats() -> None:
    dots = {
        "cheap": figures.Dot(1.0, 1.5),
        "worse": figures.Dot(2.0, 1.4),
        "better": figures.Dot(2.0, 2.0),
        "best": figures.Dot(9.0, 2.5),
        "dear": figures.Dot(10.0, 2.5),
    }
    (line,) = figures.draft_cost(dots).axes[0].lines
    assert line.get_xydata().tolist() == [[1.0, 1.5], [2.0, 2.0], [9.0, 2.5]]


def test_speed_is_drawn_with_its_interval() -> None:
    ratios = {"a": figures.Ratio(1.2, (0.9, 1.6), [0.8, 1.7]), "b": figures.Ratio(2.0, None, [2.0])}
    figure = figures.speed_ratios(ratios, "plain", rivals=["a"])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["1.20×", "2.00×"]
    assert axes.lines[1].get_xdata() == pytest.approx([0.9, 1.6])
    ticks = [float(label.get_text().rstrip("×")) for label in axes.get_xticklabels()]
    assert 1.0 in ticks
    assert ticks == pytest.approx(axes.get_xticks())


# ---- slots ----


def test_slots_are_counted_with_those_above_them(folder: Path) -> None:
    assert slot_shares({(): 5, (0,): 3, (0, 2): 1, (1,): 1}) == {
        (): 1.0,
        (0,): 0.4,
        (0, 2): 0.1,
        (1,): 0.1,
    }
    rows = [row for row in read_results(folder) if row["drafter"] == "token_recycling"]
    for row in rows:
        steps = list(read_steps(folder, row))
        assert [len(step["ranks"]) for step in steps] == [step["accepted"] for step in steps]
        shares = slot_shares(Counter(tuple(step["ranks"]) for step in steps))
        by_depth: Counter[int] = Counter()
        for path, share in shares.items():
            by_depth[len(path)] += share * len(steps)
        depths = range(1, max(by_depth) + 1)
        accepted = [round(by_depth[depth]) for depth in depths]
        assert accepted == [n for n in row["accepted_by_depth"] if n]
    assert any(rank for row in rows for step in read_steps(folder, row) for rank in step["ranks"])


def test_a_map_of_slots_shows_the_most_frequent() -> None:
    ranks = {(): 50, (0,): 30, (0, 0): 12, (0, 1): 5, (1,): 2, (2,): 1}
    figure = slot_map(ranks, title="some", most=3)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:4] == ["root", "47", "12", "5.0"]
    assert "100 steps" in figure._supxlabel.get_text()
    assert "3 of 5 slots" in figure._supxlabel.get_text()


# ---- sweeps ----


def test_seeds_are_added_up(folder: Path) -> None:
    rows = read_results(folder)
    pools = pool_seeds(rows)
    assert len(pools) == 2 * 2 * 2 + 2
    pool = next(p for p in pools if p.settings["drafter"] == "prompt_lookup")
    own = [row for row in rows if all(row[name] == value for name, value in pool.settings.items())]
    assert len(own) == 2
    emitted, calls = (sum(row[name] for row in own) for name in ("num_emitted", "target_calls"))
    assert pool.counts.block_efficiency == emitted / calls
    spent = sum(row["timing"]["seconds"][p] for row in own for p in ("draft", "observe"))
    assert pool.draft_ms == pytest.approx(1000 * spent / calls)


def test_the_calibrated_curve_follows_from_costs_and_counts(folder: Path) -> None:
    pools = [p for p in pool_seeds(read_results(folder)) if p.settings["drafter"] != "none"]
    line = [
        pool
        for pool in pools
        if (pool.settings["drafter"], pool.settings["temperature"]) == ("token_recycling", 1.0)
    ]
    fine, foretold = sweep_figures._calibrated(line, COST)
    assert (fine[0], fine[-1]) == pytest.approx((2, 8))
    for place, pool in ((0, line[0]), (-1, line[-1])):
        passes = sum(row["target_passes"] for row in pool.rows)
        spent = sum(
            seconds
            for row in pool.rows
            for phase, seconds in row["timing"]["seconds"].items()
            if phase not in ("prefill", "target")
        )
        turns = sum(row["num_turns"] for row in pool.rows)
        texts = sum(row["num_prompt_tokens"] + row["num_generated"] / 2 for row in pool.rows)
        nodes = (passes + sum(row["num_drafted"] for row in pool.rows)) / passes
        seconds = passes * COST.of([nodes], texts / turns)[0] + spent
        emitted = sum(row["num_emitted"] for row in pool.rows)
        assert foretold[place] == pytest.approx(emitted / seconds)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_sweep_is_drawn(folder: Path, tmp_path: Path, suffix: str) -> None:
    files = draw_sweep(folder, tmp_path / "out", suffix=suffix, cost=COST)
    assert [file.stem for file in files] == [
        *("acceptance_by_depth", "accepted_lengths", "draft_cost", "efficiency_by_budget"),
        *("speed_by_budget", "efficiency_by_temperature", "slots_1", "slots_2"),
    ]
    beginning = b"\x89PNG" if suffix == ".png" else b"<?xml"
    assert all(file.read_bytes().startswith(beginning) for file in files)
    assert sorted(tmp_path.joinpath("out").iterdir()) == sorted(files)


def test_block_efficiency_is_drawn_where_it_was_measured(folder: Path) -> None:
    pools = [p for p in pool_seeds(read_results(folder)) if p.settings["drafter"] != "none"]
    figure = sweep_figures.by_budget(pools)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["T=0", "T=1"]
    drawn = [line.get_ydata() for line in figure.axes[0].lines]
    for name in ("prompt_lookup", "token_recycling"):
        cold = [
            pool.counts.block_efficiency
            for pool in sorted(pools, key=lambda p: p.settings["node_budget"])
            if (pool.settings["drafter"], pool.settings["temperature"]) == (name, 0.0)
        ]
        assert any(list(line) == cold for line in drawn)
    assert len(sweep_figures.by_temperature(pools).axes) == 2


def test_a_sweep_without_drafts_says_so(folder: Path, tmp_path: Path) -> None:
    rows = [row for row in read_results(folder) if row["drafter"] == "none"]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for some in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="no cell of a drafter that was done"):
            draw_sweep(some, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"need matplotlib: pip install 'specdec-toolkit\[bench"):
        draw_sweep(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="need matplotlib"):
        figures.acceptance_by_depth({"a": counts_of(0, 1)})
