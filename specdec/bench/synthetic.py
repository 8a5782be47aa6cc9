"""A target and a drafter a set distance apart, over a small vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from scipy.optimize import brentq
from torch import Tensor

from specdec.errors import ConfigError
from specdec.testing.toys import Processor, Tokens, ToyDraft, ToyTarget, random_logits

_STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of noise, tried in this order


class SyntheticTarget(ToyTarget):
    """A random Markov law of order 2.

    Args:
        vocab_size: number of tokens.
        seed: of the table.
        sharpness: standard deviation of the logits.
        temperature: of the law; 0 for the argmax.
    """

    def __init__(
        self, vocab_size: int, seed: int, *, sharpness: float, temperature: float = 1.0
    ) -> None:
        scaling: Sequence[Processor] = ()
        if temperature > 0.0:
            scaling = [lambda _prefix, logits: logits / temperature]
        super().__init__(
            vocab_size,
            seed,
            order=2,
            sharpness=sharpness,
            processors=scaling,
            greedy=temperature == 0.0,
        )


class SyntheticDraft(ToyDraft):
    """The target's law, disturbed until its total variation from it is `distance` at temperature 1.

    Its logits are the target's plus normal noise, of a strength solved for in every context. It
    drafts with the target's temperature.

    Args:
        target: the law to be near.
        distance: total variation in every context at temperature 1, in (0, 0.9].
        temperature: of the law; 0 counts as 1, the order of the tokens is the same.
        seed: of the noise.

    Raises:
        ConfigError: if the distance is not in (0, 0.9].
    """

    def __init__(
        self, target: ToyTarget, distance: float, *, temperature: float = 1.0, seed: int = 0
    ) -> None:
        if not 0.0 < distance <= 0.9:
            raise ConfigError(f"distance must be in (0, 0.9], got {distance}")
        super().__init__(target.vocab_size, seed)
        self._target = target
        self._distance = distance
        self._temperature = temperature or 1.0
        self._noise_seed = seed
        self._known: dict[Tokens, Tensor] = {}

    def logits(self, prefix: Tokens) -> Tensor:
        """Returns ``[V]`` unnormalised logits after `prefix`."""
        context = prefix[-2:]
        if context not in self._known:
            self._known[context] = self._disturbed(context) / self._temperature
        return self._known[context]

    def log_probs(self, prefix: Tokens) -> Tensor:
        """Returns ``[V]`` float64 log-probabilities after `prefix`."""
        return super().log_probs(prefix[-2:])

    def _disturbed(self, context: Tokens) -> Tensor:
        clean = self._target.logits(context)
        p = torch.softmax(clean, dim=-1)
        for attempt in itertools.count():
            noise = random_logits(
                self.vocab_size, (2, self._noise_seed, attempt, *context), sharpness=1.0
            )

            def excess(strength: float, noise: Tensor = noise) -> float:
                q = torch.softmax(clean + strength * noise, dim=-1)
                return 0.5 * float((p - q).abs().sum()) - self._distance

            # strong noise alone may favour what the target favours: then other noise is taken
            enough = next((s for s in _STRENGTHS if excess(s) > 0.0), None)
            if enough is not None:
                return clean + float(brentq(excess, 0.0, enough)) * noise
        raise AssertionError("unreachable")
