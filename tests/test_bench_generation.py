"""The generation benchmark: what it counts, and that its command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from specdec.bench.generation import (
    BASELINE,
    Run,
    methods_of,
    peak_memory,
    summarise,
    time_prompts,
)


def run(method: str, prompt: int, seconds: float, baseline: float, category: str = "a") -> Run:
    return Run(method, prompt, category, seconds, baseline, 10, 1.5, prompt != 2)


def test_summaries_are_of_all_seconds_together() -> None:
    runs = [run("ours", 0, 1.0, 2.0), run("ours", 1, 4.0, 2.0, "b"), run("ours", 2, 1.0, 4.0)]
    first, second, overall = summarise(runs)
    assert (first.category, second.category, overall.category) == ("a", "b", "overall")
    assert first.speedup == pytest.approx(6 / 2)
    assert overall.speedup == pytest.approx(8 / 6)
    assert (overall.median, overall.slower) == (2.0, pytest.approx(1 / 3))
    assert overall.tokens_per_second == pytest.approx(30 / 6)
    assert (overall.identical, overall.prompts) == (2, 3)


@pytest.mark.parametrize("do_sample", [False, True])
def test_every_method_runs_on_every_prompt(do_sample: bool) -> None:
    model = tiny.make_model("llama")
    drafters = {"recycling": "token_recycling", "small": {"drafter": None}}
    methods = methods_of(model, None, drafters, assistant=tiny.make_model("llama", seed=1))
    prompts = [("x", {"input_ids": tiny.ids(tiny.prompt(n, n))}) for n in (7, 9)]
    runs = time_prompts(methods, prompts, repeats=2, max_new_tokens=6, do_sample=do_sample)
    assert len(runs) == 2 * len(methods) == 12
    assert {r.num_tokens for r in runs} == {6}
    assert all(r.speedup == 1.0 for r in runs if r.method == BASELINE)
    assert {r.identical for r in runs} == {None if do_sample else True}
    assert peak_memory(methods["recycling"], prompts[0][1], max_new_tokens=4) > 10**7


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = tiny.make_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny.letters().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("abcab\nbcabca\n", encoding="utf-8")
    command = [
        *(sys.executable, str(Path(__file__).parents[1] / "scripts" / "bench_generation.py")),
        *("--prompts", "prompts.txt", "--model", "model", "--max-new-tokens", "6"),
        *("--drafters", "token_recycling", "--batch-sizes", "1", "2", "--plot", "speed.svg"),
    ]
    root = str(Path(__file__).parents[1])  # a checkout serves as well as an installation
    environment = os.environ | {"PYTHONPATH": root, "SPECDEC_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "generation.json").read_text())
    assert [result["title"] for result in report["results"]] == ["batch 1", "batch 2"]
    assert report["setting"]["dtype"] == "torch.float32"
    assert (tmp_path / "speed-batch-1.svg").exists()
