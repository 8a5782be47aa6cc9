"""The grid of a sweep: what spans it, and that a mistake is told before any cell runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from specdec.bench.cells import check_names, span
from specdec.bench.grid import Grid, read_grid
from specdec.bench.sweep import run_sweep
from specdec.errors import ConfigError

ROOT = Path(__file__).parents[1]


def grid_of(**settings: Any) -> Grid:
    return Grid.from_mapping({"prompts": "q.txt", **settings})


def cells_of(**settings: Any) -> list[Any]:
    grid = grid_of(**settings)
    return span(grid, dict.fromkeys(grid.prompts, "0"))[0]


def test_every_combination_is_a_cell_of_its_own() -> None:
    cells = cells_of(
        models=["a", "b"],
        prompts=["q.txt", "p.txt"],
        drafters=["token_recycling", "prompt_lookup"],
        temperatures=[0, 0.5],
        node_budgets=[4, "auto"],
        max_depths=[None],
        batch_sizes=[1, 2],
        seeds=[0, 1],
    )
    # the two prompt files have one digest here: a cell is what it asks, not where that lies
    assert len(cells) == 64
    assert len({cell.key for cell in cells}) == 64
    assert [cell.model for cell in cells] == ["a"] * 32 + ["b"] * 32
    longer = cells_of(models="a", max_new_tokens=7)
    assert longer[0].key != cells_of(models="a", max_new_tokens=8)[0].key
    assert longer[0].key != cells_of(models="a", max_new_tokens=7, max_turns=1)[0].key
    assert cells_of(temperatures=0) == cells_of(temperatures=[0.0, 0])


def test_plain_decoding_has_neither_policy_nor_budget() -> None:
    cells = cells_of(drafters=[None], policies=["chain", "iid"], node_budgets=[2, 4], seeds=[0, 1])
    assert [(c.drafter, c.policy, c.node_budget, c.seed) for c in cells] == [
        ("none", "auto", 0, 0),
        ("none", "auto", 0, 1),
    ]


def test_pairs_that_would_not_be_lossless_are_left_out_with_the_reason() -> None:
    grid = grid_of(
        policies=["iid", "best_first", "chain (drawn)"], verifiers=["match", "block", "coupled"]
    )
    cells, left_out = span(grid, {"q.txt": "0"})
    assert [(c.policy, c.verifier) for c in cells] == [
        ("iid", "coupled"),
        ("best_first", "match"),
        ("best_first", "coupled"),
        ("chain (drawn)", "block"),
        ("chain (drawn)", "coupled"),
    ]
    reasons = {(policy, verifier): reason for policy, verifier, reason in left_out}
    assert reasons.keys() == {
        ("iid", "match"),
        ("iid", "block"),
        ("best_first", "block"),
        ("chain (drawn)", "match"),
    }
    assert "would not be lossless" in reasons["iid", "match"]
    assert "is for chains" in reasons["best_first", "block"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1}, r"unknown 'temperature'; known are: prompts, models, drafters"),
        ({"temperatures": []}, "temperatures is empty"),
        ({"temperatures": "hot"}, "temperatures: expected a number of at least 0, got 'hot'"),
        ({"temperatures": [-1]}, "at least 0"),
        ({"temperatures": [float("nan")]}, "at least 0"),
        ({"temperatures": [True]}, "at least 0"),
        ({"node_budgets": [0]}, "node_budgets: expected a positive whole number or 'auto', got 0"),
        ({"node_budgets": [2.5]}, "got 2.5"),
        ({"max_depths": "deep"}, "max_depths: expected a positive whole number or null"),
        ({"batch_sizes": [True]}, "batch_sizes: expected a positive whole number, got True"),
        ({"seeds": [2**31]}, "seeds: expected a whole number from 0 to 2147483647"),
        ({"limit": 0}, "limit: expected a positive whole number or null"),
        ({"limit": [3]}, "limit: expected"),
        ({"max_turns": 0}, "max_turns: expected a positive whole number or null, got 0"),
        ({"max_new_tokens": None}, "max_new_tokens: expected a positive whole number, got None"),
        ({"top_p": 0}, "top_p: expected a number above 0"),
        ({"dtype": "float8"}, "dtype: expected one of auto, float32"),
        ({"packed_weights": None}, "packed_weights: expected one of none, auto"),
        ({"drafters": [{"name": "x"}]}, "drafters: expected the name of a drafter"),
        ({"models": ""}, "models: expected the name or path"),
        ({"prompts": None}, "prompts: expected the name of a prompt file, got None"),
    ],
)
def test_values_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid_of(**settings)


def test_a_grid_needs_prompts() -> None:
    with pytest.raises(ConfigError, match="no prompts"):
        Grid.from_mapping({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drafters": "token_recycle"}, "unknown drafter 'token_recycle'; known are: auto, "),
        ({"drafters": "small_model"}, "small_model:NAME_OR_PATH"),
        ({"drafters": "small_model:nowhere"}, "model 'nowhere' cannot be loaded"),
        ({"drafters": "early_exit:half"}, "early_exit:LAYERS"),
        ({"drafters": "prompt_lookup:3"}, "'prompt_lookup' takes no argument"),
        ({"drafters": "student:nowhere"}, "without a config.json; expected one that .* student"),
        ({"drafters": "hybrid:suffix+nothing"}, "unknown drafter 'nothing'"),
        ({"drafters": "hybrid:suffix+none"}, "a hybrid is made of drafters"),
        ({"policies": ["chain", "best"]}, "unknown policy 'best'; known are: auto, best_first"),
        ({"policies": "iid (drawn)"}, r"unknown policy 'iid \(drawn\)'; drawn forms have: chain"),
        ({"verifiers": "nucleus"}, "unknown verifier 'nucleus'; known are: auto, block"),
        ({"max_depths": [2]}, "max_depths needs policies by name"),
        ({"models": "no/such-model"}, "model 'no/such-model' cannot be loaded"),
    ],
)
def test_unknown_names_are_told_before_any_cell_runs(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "q.txt").write_text("ab\n")
    grid = grid_of(**{"prompts": str(tmp_path / "q.txt"), "models": "no/model", **settings})
    with pytest.raises(ConfigError, match=message):
        check_names(grid)
    with pytest.raises(ConfigError, match=message):
        run_sweep(grid, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_grid_without_a_cell_says_why(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("ab\n")
    grid = grid_of(prompts=str(tmp_path / "q.txt"), policies="sequoia", verifiers="match")
    with pytest.raises(ConfigError, match=r"no cell.*would not be lossless"):
        run_sweep(grid, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0, 1", r"is not YAML: .*line 1"),
        ("a: b: c", r"is not YAML: .*line 1, column 5"),
        ("seeds: !!python/object:os.system {}", "is not YAML"),
        ("- 1\n- 2\n", "expected names with values.*got list"),
        ("", "got nothing"),
    ],
)
def test_malformed_yaml_is_refused_with_the_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_grid(tmp_path / "grid.yaml")


def test_grid_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_grid(tmp_path / "grid.yaml")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_grid(tmp_path / "none.yaml")


def test_a_grid_is_what_it_writes() -> None:
    grid = grid_of(drafters=["none", "early_exit:2"], max_depths=[None, 3], limit=5)
    assert Grid.from_mapping(grid.to_dict()) == grid


def test_the_commands_options_take_the_files_place(tmp_path: Path) -> None:
    tiny.make_model("llama").save_pretrained(tmp_path / "model")
    tiny.letters().save_pretrained(tmp_path / "model")
    (tmp_path / "q.txt").write_text("ab\nba\nca\n")
    (tmp_path / "grid.yaml").write_text(
        "prompts: q.txt\nmodels: model\ntemperatures: hot\nmax_new_tokens: 5\n"
    )
    command = [sys.executable, str(ROOT / "scripts" / "sweep_acceptance.py"), "--grid", "grid.yaml"]
    command += ["--out", "out", "--limit", "2"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    wrong = run()
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("specdec sweep: grid.yaml: temperatures: exp")
    right = run("--temperatures", "0,0.5", "--node-budgets", "4,8", "--max-depths", "null")
    assert right.returncode == 0, right.stderr
    assert "4 cells measured now, 0 broken, 0 known before; out has 4" in right.stdout
    assert "block eff." in right.stdout
