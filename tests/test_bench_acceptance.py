"""The table of block efficiencies: its laws, its cells, and the script that resumes."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest

from specdec.bench.acceptance import declared_pairs, distinct, synthetic_cell
from specdec.bench.synthetic import SyntheticDraft, SyntheticTarget
from specdec.errors import ConfigError

SCRIPT = Path(__file__).parent.parent / "scripts" / "tabulate_acceptance.py"


@pytest.mark.parametrize("distance", [0.1, 0.5, 0.9])
def test_the_synthetic_laws_are_the_set_distance_apart(distance) -> None:
    target = SyntheticTarget(16, 3, sharpness=2.0)
    draft = SyntheticDraft(target, distance)
    for context in ((0, 1), (5, 5), (15, 2)):
        p, q = target.probs(context), draft.log_probs(context).exp()
        assert 0.5 * float((p - q).abs().sum()) == pytest.approx(distance, abs=1e-6)


def test_a_distance_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="distance"):
        SyntheticDraft(SyntheticTarget(8, 0, sharpness=1.0), 0.95)


def test_pairs_declare_each_other_and_coincide_at_temperature_zero() -> None:
    pairs = declared_pairs()
    assert ("sequoia", "traversal") in pairs
    assert ("chain (drawn)", "block") in pairs
    assert ("coupled_best_first", "match") not in pairs
    assert ("dyspec", "block") not in pairs
    assert len(list(distinct(pairs, 0.0))) == len({policy for policy, _ in pairs})
    assert list(distinct(pairs, 1.0)) == pairs


def test_a_near_drafter_accepts_more() -> None:
    near, far = (
        synthetic_cell("chain (drawn)", "block", 1.0, 4, distance=d, texts=2) for d in (0.1, 0.8)
    )
    assert near.block_efficiency > 1.5 * far.block_efficiency
    assert near.steps == far.steps == 100


def test_the_script_resumes_where_it_was(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "cells.csv"
    arguments = ["synthetic", "--budgets", "4", "--temperatures", "1.0", "--texts", "1"]
    arguments += ["--pairs", "chain (drawn)/block", "best_first/match", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first = out.read_text()
    rows = list(csv.DictReader(first.splitlines()))
    assert {row["policy"] for row in rows} == {"chain (drawn)", "best_first"}
    out.write_text("".join(first.splitlines(keepends=True)[:2]))  # killed after one cell
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert out.read_text() == first
    assert "| best_first | match |" in out.with_suffix(".md").read_text()
    assert "Block efficiency" in capsys.readouterr().out
