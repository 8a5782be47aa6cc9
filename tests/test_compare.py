"""Comparisons: who takes part, that the numbers are those of the runs, and what is written."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from specdec import SpeculativeGenerator, build
from specdec.bench import figures, files
from specdec.bench.compare import Comparison, check_folder, compare, save
from specdec.bench.drafters import drafters_for
from specdec.bench.generation import BASELINE, LOOKUP, PLAIN, Method, methods_of, time_prompts
from specdec.bench.tables import wide_console
from specdec.cli import main
from specdec.drafters import TokenRecycling
from specdec.drafters.checkpoint import save_checkpoint
from specdec.errors import ConfigError
from specdec.prompts import Prompt, encode

PROMPTS = [Prompt("abcabcab", "a"), Prompt("bcabbcab", "b"), Prompt("ccacca", "a", number=2)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama")


@pytest.fixture(scope="module")
def made(model: Any) -> Comparison:
    return compare(model, tiny.letters(), PROMPTS, max_new_tokens=16, command=["specdec", "x y"])


@pytest.fixture(scope="module")
def written(made: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    folder: Path = check_folder(tmp_path_factory.mktemp("compare") / "new" / "out")
    save(made, folder)
    return folder


# ---- who takes part ----


def test_drafters_come_from_the_registry(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConfigError("no weights for this model")

    class Picky(TokenRecycling):
        """Fits no model."""

        def attach(self, target: Any) -> None:
            raise ConfigError("another vocabulary")

    more = {"a_new_one": TokenRecycling, "needs_weights": refuse, "picky": Picky}
    monkeypatch.setattr(build, "DRAFTERS", build.DRAFTERS | more)
    fitting, left_out = drafters_for(model, None)
    assert {"a_new_one", "hybrid", "prompt_lookup", "suffix", "trigram"} <= set(fitting)
    assert left_out.keys() >= {"early_exit", "needs_weights", "picky", "small_model"}
    assert left_out["needs_weights"] == "no weights for this model"
    assert sorted([*fitting, *left_out]) == build.drafter_names()


def test_all_take_part_and_write_what_plain_decoding_writes(made: Comparison) -> None:
    methods = {run.method for run in made.measured.runs}
    assert {BASELINE, PLAIN, LOOKUP, "hybrid", "suffix", "token_recycling"} <= methods
    assert methods == set(made.measured.memory) == set(made.setting["methods"])
    assert all(run.identical for run in made.measured.runs)
    assert len(made.measured.runs) == len(PROMPTS) * len(methods)


def test_those_on_request_take_part_when_asked_for(model: Any, tmp_path: Path) -> None:
    tiny.make_model("llama", seed=1).save_pretrained(tmp_path / "draft")
    tiny.letters().save_pretrained(tmp_path / "draft")
    save_checkpoint(tmp_path / "pads", "lexical_unit", model, {"pads": torch.zeros(2, 32)}, {})
    wanted = [
        "early_exit:1",
        f"small_model:{tmp_path / 'draft'}",
        f"lexical_unit:{tmp_path / 'pads'}",
        "hybrid:suffix+early_exit:1",
    ]
    found = compare(model, tiny.letters(), PROMPTS[:1], wanted, max_new_tokens=6)
    assert set(found.measured.memory) == {
        *(BASELINE, PLAIN, LOOKUP, "transformers assisted"),
        *wanted,
    }
    assert all(run.identical for run in found.measured.runs)
    assert found.setting["left_out"] == {}


# ---- the numbers ----


def test_counts_are_those_of_the_step_log(model: Any, made: Comparison) -> None:
    generator = SpeculativeGenerator(model, tiny.letters(), drafter="trigram", node_budget=8)
    for number, prompt in enumerate(PROMPTS):
        ids = encode(tiny.letters(), prompt)
        _prefill, *steps = generator.trace(ids, max_new_tokens=16, do_sample=False)
        (run,) = [r for r in made.measured.runs if (r.method, r.prompt) == ("trigram", number)]
        emitted = sum(len(step.tokens) for step in steps)
        lengths = [len(step.path) for step in steps]
        assert run.counts.block_efficiency == emitted / len(steps)
        assert run.counts.num_drafted == sum(len(step.tree) - 1 for step in steps)
        assert run.counts.acceptance_histogram == np.bincount(lengths).tolist()
        deep = [sum(length > depth for length in lengths) for depth in range(max(lengths))]
        reached = [n for n in run.counts.accepted_by_depth if n]
        assert reached == deep
        assert run.num_tokens == emitted + 1 == 16


def test_an_end_inside_an_accepted_block_counts_for_all_alike() -> None:
    model = tiny.make_model("llama")
    prompt = tiny.prompt(9)
    text = model.generate(tiny.ids(prompt), max_new_tokens=24, do_sample=False)[0, 9:].tolist()
    place = next(i for i in range(3, 8) if text[i] not in text[:i])
    model.generation_config.eos_token_id = text[place]
    knowing = {"drafter": tiny.Oracle([text]), "policy": "chain", "node_budget": 12}
    makers = methods_of(model, None, {"oracle": knowing})
    methods: Mapping[str, Method] = {name: make() for name, make in makers.items()}
    runs = time_prompts(
        methods,
        [("x", {"input_ids": tiny.ids(prompt)})],
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
    )
    assert {run.num_tokens for run in runs} == {place + 1}
    (oracle,) = [run for run in runs if run.method == "oracle"]
    assert oracle.counts.num_emitted == place
    assert oracle.counts.target_calls < place, "no block was cut"
    assert oracle.counts.num_accepted <= place


def test_the_table_is_that_of_the_runs(written: Path) -> None:
    rows = list(csv.DictReader((written / "results.csv").open(newline="")))
    runs = list(csv.DictReader((written / "runs.csv").open(newline="")))
    assert len(rows) == 3 * len({row["method"] for row in rows})
    for row in rows:
        own = [
            run
            for run in runs
            if run["method"] == row["method"] and row["category"] in (run["category"], "overall")
        ]
        assert len(own) == int(row["prompts"])
        seconds, baseline, calls, emitted = (
            sum(float(run[name]) for run in own)
            for name in ("seconds", "baseline_seconds", "target_calls", "num_emitted")
        )
        assert float(row["speedup"]) == pytest.approx(baseline / seconds)
        assert float(row["block_efficiency"]) == pytest.approx(emitted / calls)
        if int(row["num_drafted"]):
            drafting = sum(float(run["draft_seconds"]) for run in own)
            assert float(row["draft_ms"]) == pytest.approx(1000 * drafting / calls)
            by_depth = [json.loads(run["accepted_by_depth"]) for run in own]
            assert json.loads(row["accepted_by_depth"])[0] == sum(d[0] for d in by_depth)
    (baseline_row,) = [r for r in rows if (r["method"], r["category"]) == (BASELINE, "overall")]
    assert float(baseline_row["speedup"]) == float(baseline_row["block_efficiency"]) == 1.0


# ---- what is written ----


def test_the_report_holds_everything_and_needs_nothing(written: Path, made: Comparison) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|<script", html)
    for method in made.measured.memory:
        assert f"<td>{method}</td>" in html
    facts = ["LlamaForCausalLM", "float32", "greedy, up to 16 new tokens", "specdec &#39;x y&#39;"]
    facts += [made.setting["begun"], "transformers 5.", "left out: only on request", "first turns"]
    assert [fact for fact in facts if fact not in html] == []
    for category in ("a <", "b <", "overall <"):
        assert f"<td>{category}" in html


def test_the_manifest_has_what_a_figure_needs(written: Path, made: Comparison) -> None:
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest == made.setting
    assert {"versions", "git", "hardware", "command", "begun", "methods"} <= manifest.keys()
    assert manifest["prompts"]["count"] == 3
    assert manifest["methods"]["trigram"]["node_budget"] == 8


def test_texts_are_not_compared_where_they_are_sampled(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = compare(
        model, tiny.letters(), PROMPTS[:2], ["suffix"], max_new_tokens=6, temperature=0.8
    )
    assert {run.identical for run in found.measured.runs} == {None}
    save(found, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "temperature 0.8" in html
    assert "texts identical" not in html


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "runs": []}', "something else than a comparison .*schema 1,"),
        ('{"schema": "specdec comparison 0"}', "schema 'specdec comparison 0'"),
        ('{"schema": "specdec comp', "is no manifest of a comparison"),
        ("[]", "schema 'list'"),
    ],
    ids=["sweep", "older", "half-written", "list"],
)
def test_a_folder_of_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_text() == text


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match=r"cannot be used .*expected a folder that can be"):
            check_folder(out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_the_comparison_before(
    written: Path, made: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in written.iterdir()}

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*results\.csv cannot be written"):
        save(made, written)
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before


# ---- the command ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drafters", "nonsense"], "unknown drafter 'nonsense'; known are: auto, diffusion"),
        (["--drafters", "suffix:3"], "'suffix' takes no argument"),
        (["--drafters", "small_model"], "small_model:NAME_OR_PATH"),
        (["--prompts", "missing.txt"], "missing.txt does not exist"),
        (["--prompts", "empty.txt"], "empty.txt is empty"),
        (["--prompts", "binary.txt"], "binary.txt is not UTF-8 text"),
        (["--prompts", "bad.jsonl"], "bad.jsonl:1: not a JSON object"),
        (["--out", "empty.txt"], "expected a folder that can be"),
        (["--limit", "0"], "argument --limit: expected a positive whole number, got '0'"),
        (["--max-new-tokens", "-3"], "--max-new-tokens: expected a positive whole number"),
        (["--node-budget", "many"], "--node-budget: expected a positive whole number"),
        (["--temperature", "-1"], "--temperature: expected a number of at least 0, got '-1'"),
        (["--temperature", "nan"], "expected a number of at least 0, got 'nan'"),
        (["--top-p", "0"], "--top-p: expected a number above 0 and up to 1"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told_before_any_work(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    Path("bad.jsonl").write_text("turns\n")
    # loading it would fail with another message
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--model", "no/such/folder", "--out", "out", *options])
    printed = capsys.readouterr().err
    assert "specdec compare: " in printed
    assert message in printed
    assert not Path("out", "results.csv").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_told_before_any_work(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--model", "no/such/folder", "--out", "out"])
    assert f"need {package}: pip install 'specdec-toolkit[bench]'" in capsys.readouterr().err


def test_tables_are_whole_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the output is no terminal rich would fold them at 80 columns."""
    wide_console().print("x" * 120)
    assert "x" * 120 + "\n" in capsys.readouterr().out
