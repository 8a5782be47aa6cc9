"""The commands of the README, run as a user runs them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from specdec.cli import main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "specdec", *arguments], capture_output=True, text=True, check=False
    )


def test_help_names_the_commands():
    result = run("--help")
    assert result.returncode == 0
    assert "demo" in result.stdout
    assert "generate" in result.stdout


def test_a_missing_model_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--model", "/no/such/folder", "--prompt", "x"])
    assert "specdec generate:" in capsys.readouterr().err


def test_a_figure_that_cannot_be_saved_is_noticed_before_the_work(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--model", "/no/such/folder", "--figure", "tree.gif"])
    assert "specdec demo: a tree is saved as .svg or .png" in capsys.readouterr().err


@pytest.mark.model
def test_unknown_drafter_lists_the_known(demo_model_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--prompt", "x", "--drafter", "nonsense"])
    assert "prompt_lookup" in capsys.readouterr().err


@pytest.mark.model
def test_the_demo_compares_and_draws(demo_model_path, capsys, tmp_path):
    picture = tmp_path / "tree.svg"
    figure = ["--figure", str(picture)] if importlib.util.find_spec("matplotlib") else []
    main(["demo", "--max-new-tokens", "24", *figure])
    printed = capsys.readouterr().out
    assert printed.count(" yes ") == 3
    assert "NO" not in printed
    assert "block efficiency" in printed.replace("\n", " ")
    assert "✓" in printed
    assert "draft → target probability" in printed
    assert picture.exists() == bool(figure)


@pytest.mark.model
def test_generate_reads_a_prompt_from_a_file(demo_model_path, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Name three colours.")
    prompt = f"@{tmp_path / 'prompt.txt'}"
    sampling = ["--temperature", "0.7", "--seed", "3"]
    main(["generate", "--prompt", prompt, "--max-new-tokens", "12", *sampling])
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert "target calls" in printed.err
