"""Every command that documents and help texts show is run, with a tiny model and few tokens.

A command is a line of an indented block, or code within a line that has options.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from specdec.bench.grid import Grid
from specdec.bench.sweep import run_sweep
from specdec.cli import COMMANDS, main

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

ROOT = Path(__file__).parents[1]
_DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "docs/*.md", "scripts/*.py", "specdec/commands/*.py"),
    "specdec/training/cli.py",
)
_PROGRAM = r"(?:python -m specdec|python scripts/|accelerate launch)"
_BLOCK = re.compile(rf"^ {{4,}}({_PROGRAM}.*(?:(?<=\\)\n.*)*)", re.MULTILINE)
_INLINE = re.compile(rf"`({_PROGRAM}[^`\n]* --[^`\n]*)`")
_FEW_TEXTS = "--model model --texts own --num-texts 6 --answer-tokens 8 --prompt-tokens 8 --quiet"
_SHORT_RUN = f"{_FEW_TEXTS} --held-out 2 --eval-tokens 2 --vocab-size 64"
_ONE_LAYER = "--contexts 16 --heads 2 --kv-heads 1 --head-dim 8 --rotate-mb 1 --repeats 1"
# what makes a command small, by the name of its command or script
_SMALL = {
    "demo": "--model model --max-new-tokens 4",
    "generate": "--model model --max-new-tokens 4",
    "compare": "--model model --max-new-tokens 2 --limit 1",
    "bench": "--model model --max-new-tokens 2 --limit 1",
    "sweep": "--models model --max-new-tokens 4 --limit 1 --node-budgets 4 --seeds 0",
    "sweep_acceptance": "--models model --max-new-tokens 4 --limit 1",
    "measure_block_efficiency": "--model model --max-new-tokens 4 --limit 2",
    "tabulate_acceptance synthetic": "--texts 1 --temperatures 1 --budgets 4 --pairs chain/match",
    "tabulate_acceptance model": "--model model --max-new-tokens 4 --limit 2 --budgets 4 "
    "--temperatures 0 --pairs best_first/coupled --drafter token_recycling",
    "bench_trees": "--nodes 8 --vocab-size 64 --repeats 1 --policies top_n",
    "bench_layouts": "--rows 1 3 --context 8 --repeats 1",
    "bench_kernels --out": _ONE_LAYER,
    "bench_kernels --contexts": _ONE_LAYER,
    "bench_kernels --passes": "--passes tiny --contexts 16 --repeats 1",
    "train student": f"{_SHORT_RUN} --epochs 1 --layers 0",
    "train diffusion": f"{_SHORT_RUN} --minutes 0.001",
    "train trigram": f"{_FEW_TEXTS} --held-out 2 --eval-tokens 2 --held-out-share 0.5",
    "train text": _FEW_TEXTS,
    "fit_scaling_law": "",
    "plot_sweep": "",
}


def documented() -> list[str]:
    """Returns the commands in the order of the documents, each once."""
    found: dict[str, None] = {}
    for pattern in _DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text(encoding="utf-8").replace("\\\\\n", "\\\n")
            for expression in (_BLOCK, _INLINE):
                for command in expression.findall(text):
                    found[" ".join(command.replace("\\\n", " ").split())] = None
    return [command for command in found if "--help" not in command]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name: a model, prompts, points, a sweep."""
    folder: Path = tmp_path_factory.mktemp("documented")
    model = tiny.make_model("llama", max_position_embeddings=4096)  # the documented contexts
    model.save_pretrained(folder / "model")
    tiny.letters().save_pretrained(folder / "model")
    turns = ["abcab", "bcabc", "cabca", "aabbc", "bbcca"]
    lines = [f'{{"turns": ["{turn}"], "category": "{turn[0]}"}}\n' for turn in turns]
    (folder / "question.jsonl").write_text("".join(lines))
    (folder / "question.txt").write_text("abcabc")
    (folder / "run.yaml").write_text("save_every: 7\n")
    (folder / "grid.yaml").write_text("prompts: question.jsonl\ntemperatures: [0, 1]\n")
    rows = [f"{2**i},{3 + i * i % 5},{1.5 + 0.2 * i}\n" for i in range(8)]
    heading = "training_tokens,draft_parameters,block_efficiency\n"
    (folder / "points.csv").write_text(heading + "".join(rows))
    grid = Grid.from_mapping(
        {
            "models": str(folder / "model"),
            "prompts": str(folder / "question.jsonl"),
            "batch_sizes": [1, 2, 3, 4, 5],
            "node_budgets": 4,
            "max_new_tokens": 4,
        }
    )
    assert run_sweep(grid, folder / "sweep", progress=False).errors == 0
    return folder


def test_the_documents_show_every_command() -> None:
    commands = documented()
    shown = {words[3] for c in commands if (words := c.split())[:3] == ["python", "-m", "specdec"]}
    assert shown == set(COMMANDS)
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    # these are commands under another name
    scripts -= {"bench_generation.py", "compare_drafters.py", "train_drafter.py"}
    assert {name for name in scripts if not any(name in command for command in commands)} == set()


@pytest.mark.parametrize("command", documented())
def test_it_runs(
    command: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    # the model has two layers
    command = re.sub(r"(early_exit:|--draft-layers )\d+", r"\g<1>1", command)
    words = shlex.split(re.sub(r"small_model:[\w.-]+", "small_model:model", command))
    # a launcher's processes are the matter of another test
    script = next((word for word in words if word.startswith("scripts/")), None)
    words = words[3:] if script is None else words[words.index(script) :]
    name = words[0] if script is None else Path(script).stem
    name = name if name in _SMALL else f"{name} {words[1]}"
    assert name in _SMALL, f"say in _SMALL what makes {name!r} small"
    words += shlex.split(_SMALL[name])
    if script is None:
        main(words)
    else:
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    after = {path.relative_to(folder) for path in folder.rglob("*")} - before
    for option in ("--out", "--figure", "--plot"):
        if option in words and words[words.index(option) + 1] != "sweep":
            wanted = Path(words[words.index(option) + 1])
            # `bench` names its pictures by what they show
            assert any(p.stem.startswith(wanted.stem) and p.suffix == wanted.suffix for p in after)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert f"python -m specdec {name} " in printed or f"python -m specdec {name}\n" in printed
    assert len(printed.splitlines()) > 15
