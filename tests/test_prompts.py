"""Prompt files are read as they come, and bad ones are refused with the place of the trouble."""

from __future__ import annotations

import json
import sys
import types

import pytest
import tiny

from specdec.errors import ConfigError
from specdec.prompts import (
    Prompt,
    digest,
    encode,
    encode_chat,
    read_prompts,
    spread_over_categories,
)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_spec_bench_comes_with_all_turns(tmp_path):
    record = {
        "question_id": 1,
        "category": "math",
        "turns": ["first", "second"],
        "reference": ["x"],
    }
    (prompt,) = read_prompts(write(tmp_path / "q.jsonl", record))
    assert prompt == Prompt("first", "math", ("second",), 1)
    assert prompt.turns == ("first", "second")


def test_a_line_separator_in_a_text_is_no_end_of_line(tmp_path):
    """str.splitlines cuts at U+2028, which JSON may hold as it is."""
    (tmp_path / "q.jsonl").write_text(
        '{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n', encoding="utf-8"
    )
    read = read_prompts(tmp_path / "q.jsonl")
    assert [(p.text, p.number) for p in read] == [("a\u2028b", 0), ("c", 1)]


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
    (tmp_path / "zero.txt").write_bytes(b"PK\x03\x00\x00")
    with pytest.raises(ConfigError, match="has a zero byte"):
        read_prompts(tmp_path / "zero.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(ConfigError, match=r"broken.jsonl:3: not a JSON object"):
        read_prompts(tmp_path / "broken.jsonl")
    with pytest.raises(ConfigError, match="expected an object with"):
        read_prompts(write(tmp_path / "other.jsonl", {"question": "a"}))
    for turns in ([], "abc", ["a", 3], [" "]):
        with pytest.raises(ConfigError, match=r"`turns` \(a list of texts\)"):
            read_prompts(write(tmp_path / "turns.jsonl", {"turns": turns}))
    with pytest.raises(ConfigError, match="not a JSON object but list"):
        read_prompts(write(tmp_path / "list.jsonl", ["a"]))
    with pytest.raises(ConfigError, match="question_id must be"):
        read_prompts(write(tmp_path / "id.jsonl", {"prompt": "a", "question_id": [1]}))


def test_data_sets_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # whether it is installed or not
    with pytest.raises(ConfigError, match="needs the package datasets: pip install datasets"):
        read_prompts("datasets:someone/questions")


def test_data_sets_are_read_like_jsonl(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        if split == "none":
            raise ValueError("unknown split")
        return [{"question": "one", "prompt": 3}, {"question": "two", "prompt": 4}]

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    name = "datasets:someone/questions?config=main&split=train&column=question"
    assert read_prompts(name) == [Prompt("one"), Prompt("two")]
    assert asked == [("someone/questions", "main", "train")]
    with pytest.raises(ConfigError, match="record 0: expected an object with"):
        read_prompts("datasets:someone/questions")
    with pytest.raises(ConfigError, match="cannot be loaded: unknown split"):
        read_prompts("datasets:someone/questions?split=none")
    for bad in ("datasets:", "datasets:a?row=3", "datasets:a?split="):
        with pytest.raises(ConfigError, match="expected datasets:NAME"):
            read_prompts(bad)


def test_a_digest_is_that_of_what_is_asked(tmp_path):
    (tmp_path / "q.txt").write_text("one\ntwo\n")
    as_json = read_prompts(write(tmp_path / "q.jsonl", {"prompt": "one"}, {"prompt": "two"}))
    assert digest(read_prompts(tmp_path / "q.txt")) == digest(as_json)
    assert digest(as_json) != digest(as_json[::-1])
    assert digest([Prompt("a", "", ("b",))]) != digest([Prompt("a"), Prompt("b")])


def test_a_chat_has_the_answers_between_the_turns():
    tokenizer = tiny.letters()
    said = ["ab", "cd", "ef"]
    plain = tokenizer.decode(encode_chat(tokenizer, said)[0])
    assert plain.replace("<pad>", "") == "abcdef"  # blank lines are no letters
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' if m['role'] == 'user' else '>' }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert tokenizer.decode(encode_chat(tokenizer, said)[0]) == "<ab>cd<ef>"
    assert encode(tokenizer, Prompt("ab", "", ("ef",))).equal(encode_chat(tokenizer, ["ab"]))


def test_spread_takes_from_every_category_and_keeps_file_order():
    prompts = [Prompt(f"{c}{i}", c) for c in "abc" for i in range(4)]
    chosen = spread_over_categories(prompts, 7)
    assert [p.text for p in chosen] == ["a0", "a1", "a2", "b0", "b1", "c0", "c1"]
