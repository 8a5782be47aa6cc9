"""Prompt files are read as they come, and bad ones are refused with the place of the trouble."""

from __future__ import annotations

import json

import pytest

from specdec.errors import ConfigError
from specdec.prompts import Prompt, read_prompts, spread_over_categories


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_spec_bench_takes_the_first_turn(tmp_path):
    record = {"question_id": 1, "category": "math", "turns": ["first", "second"]}
    assert read_prompts(write(tmp_path / "q.jsonl", record)) == [Prompt("first", "math")]


def test_jsonl_with_a_prompt_field(tmp_path):
    assert read_prompts(write(tmp_path / "q.jsonl", {"prompt": "hello"})) == [Prompt("hello")]


def test_plain_text_is_a_prompt_a_line(tmp_path):
    path = tmp_path / "q.txt"
    path.write_text("one\n\ntwo\n")
    assert read_prompts(path) == [Prompt("one"), Prompt("two")]


def test_bad_files_say_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prompts(tmp_path / "binary.txt")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ConfigError, match=r"broken.jsonl:2: not a JSON object"):
        read_prompts(tmp_path / "broken.jsonl")
    with pytest.raises(ConfigError, match="expected an object with"):
        read_prompts(write(tmp_path / "other.jsonl", {"question": "a"}))


def test_spread_takes_from_every_category_and_keeps_file_order():
    prompts = [Prompt(f"{c}{i}", c) for c in "abc" for i in range(4)]
    chosen = spread_over_categories(prompts, 7)
    assert [p.text for p in chosen] == ["a0", "a1", "a2", "b0", "b1", "c0", "c1"]
