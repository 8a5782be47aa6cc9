"""Features of the target's layers: what a drafter is shown is what the model computes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from specdec import SpeculativeGenerator
from specdec.backend.features import FeatureTap, decoder_layers
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.errors import ConfigError
from specdec.types import DrafterNeeds, PromptRows, StepOutcome
from tests.tiny import make_model


class Reader(PromptLookup):
    """Guesses from the prompt, and keeps the features of every committed token."""

    def __init__(self, layers: tuple[int, ...], prompt_top_k: int = 0) -> None:
        super().__init__()
        self.needs = DrafterNeeds(prompt_top_k=prompt_top_k, layers=layers)
        self.features: dict[int, list[torch.Tensor]] = {}
        self.num_drafted = 0

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        super().start(row, prompt, prompt_rows)
        assert prompt_rows is not None
        assert prompt_rows.features is not None
        assert prompt_rows.ids.shape[1] == self.needs.prompt_top_k
        self.features[row] = [prompt_rows.features]

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        super().observe(outcomes)
        for outcome in outcomes:
            assert outcome.features is not None
            assert len(outcome.features) == len(outcome.tree)
            self.num_drafted += len(outcome.path)
            kept = [0, *outcome.path][: len(outcome.emitted)]
            self.features[outcome.row].append(outcome.features[kept])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("prompt_top_k", [0, 4])
def test_features_of_every_committed_token(family: str, prompt_top_k: int) -> None:
    model = make_model(family)
    reader = Reader((0, -1), prompt_top_k)
    generator = SpeculativeGenerator(model, drafter=reader, node_budget=6)
    prompts = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6], [0, 0, 0, 9, 8, 9, 8, 9]])
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    texts = generator.generate(prompts, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert reader.num_drafted > 0
    layers = decoder_layers(model)
    outputs: dict[int, torch.Tensor] = {}
    for index in (0, len(layers) - 1):
        layers[index].register_forward_hook(
            lambda _m, _i, out, index=index: outputs.__setitem__(
                index, out[0] if isinstance(out, tuple) else out
            )
        )
    for row, start in enumerate([0, 3]):
        seen = torch.cat(reader.features[row])
        with torch.no_grad():
            model(texts[row : row + 1, start:])
        expected = torch.cat([outputs[0], outputs[len(layers) - 1]], dim=-1)[0]
        # the last token of a text is never run
        assert len(expected) - len(seen) == 1
        torch.testing.assert_close(seen, expected[: len(seen)], rtol=1e-4, atol=1e-4)


def test_hooks_stand_only_while_a_pass_runs() -> None:
    model = make_model("llama")
    tap = FeatureTap(model, [1])
    with tap.reading():
        assert len(decoder_layers(model)[1]._forward_hooks) == 1
    assert all(not layer._forward_hooks for layer in decoder_layers(model))
    with pytest.raises(IndexError), tap.reading():
        model(torch.tensor([[10**9]]))
    assert all(not layer._forward_hooks for layer in decoder_layers(model))


def test_a_layer_the_model_does_not_have() -> None:
    model = make_model("llama")
    count = len(decoder_layers(model))
    with pytest.raises(ConfigError, match=f"layers 0 to {count - 1}"):
        FeatureTap(model, [count])
