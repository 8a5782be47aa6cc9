"""Trains the slots of `lexical_unit`: vectors behind the text, seen by a frozen target."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.backend.cache import TreeCache
from specdec.backend.pads import PadGroups
from specdec.backend.probe import probed
from specdec.drafters.checkpoint import save_checkpoint
from specdec.drafters.lexical_unit import KIND, mean_embedding
from specdec.errors import ConfigError
from specdec.training.corpus import OwnText

_INITIAL_NOISE = 0.1  # of the embeddings' own spread: equal slots would stay nearly equal
_SPREAD_OF = 64  # embeddings that show the spread


@dataclass(frozen=True, slots=True)
class UnitSettings:
    """How slots are trained.

    Attributes:
        num_pads: slots of a group.
        alpha: a lexical unit is a maximal run of tokens that the target gives more than this.
        outside: weight of a slot whose token, or one between it and the slots' first, is in no
            unit; 0 to train on units alone, as LUD does. What is left of them calibrates the laws.
        decay: of the weight from slot to slot.
        groups: insertion points of a text and epoch.
        batch_texts: texts of a batch.
        seed: of the vectors' first values.
    """

    num_pads: int = 3
    alpha: float = 0.3
    outside: float = 0.25
    decay: float = 0.8
    groups: int = 32
    batch_texts: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.num_pads, self.groups, self.batch_texts)
        shares = (self.alpha, self.outside, self.decay)
        if min(counts) < 1 or not all(0 <= share <= 1 for share in shares) or self.decay == 0:
            raise ConfigError(
                f"num_pads, groups and batch_texts must be at least 1, alpha, outside and decay "
                f"from 0 to 1, got {self}"
            )


class UnitBatch(NamedTuple):
    """Some texts with insertion points; B texts of up to T tokens, G points each, g slots a point.

    Attributes:
        tokens: ``[B, T]`` int64, zeros behind a text's end.
        points: ``[B, G]`` int64, the last token that a group sees.
        ids: ``[B, G, g, k]`` int64, the likeliest tokens of the law each slot is to learn.
        log_probs: ``[B, G, g, k]`` float32, theirs.
        weights: ``[B, G, g]`` float32, what each slot counts.
    """

    tokens: Tensor
    points: Tensor
    ids: Tensor
    log_probs: Tensor
    weights: Tensor


class LexicalUnitRecipe:
    """Fits the vectors to the target's own laws at random places of its own text.

    The law that slot j behind token i learns is the target's after the text's tokens up to
    i + 1 + j, one it cannot see past i; the loss is the Kullback-Leibler divergence over the law's
    kept tokens and "any other". Keys and values of the real tokens come from one pass without
    gradients, all groups of a text from a second one, each under a mask of its own: gradients run
    through the slots' rows alone, and change nothing but the vectors.

    Source: PPD (arXiv 2405.18628): a frozen model, distillation into prompt tokens at random
    insertion points, decaying weights; one vector a slot here, no ensemble. Weights by lexical
    units are LUD's idea (arXiv 2405.15208), which tunes the model on units alone and takes the text
    of a data set; here the units are those of the target's own text, and everything else keeps a
    small weight.

    Args:
        target: the frozen model that wrote the texts; it is left as it is.
        settings: how.
    """

    kind = KIND
    layers: tuple[int, ...] = ()
    learning_rate = 1e-2  # a few thousand numbers: what trains weights would take days

    def __init__(self, target: Any, settings: UnitSettings) -> None:
        self._target = target
        self._settings = settings
        self._backend = probed(target, packed_weights=None)
        self._module = _Slots(_first_vectors(target, settings, self._backend.device))

    def module(self) -> torch.nn.Module:
        """Returns the vectors, ``[g, D]``, as the one parameter of a module."""
        return self._module

    def num_batches(self, texts: Sequence[OwnText]) -> int:
        """Returns the batches of an epoch."""
        return -(-len(texts) // self._settings.batch_texts)

    def batches(self, texts: Sequence[OwnText], generator: torch.Generator) -> Iterator[UnitBatch]:
        """Yields every text once, at new places; the same ones for the same generator.

        Raises:
            ConfigError: if the texts have no laws.
        """
        order = torch.randperm(len(texts), generator=generator).tolist()
        size = self._settings.batch_texts
        for begin in range(0, len(order), size):
            chosen = [texts[i] for i in order[begin : begin + size]]
            yield self._batch(chosen, generator)

    def loss(self, batch: UnitBatch, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Returns the mean divergence of a batch's slots by weight, and how often they are right.

        Args:
            batch: from `batches`.
            progress: of the run, 0 to 1; nothing depends on it here.
        """
        log_probs = torch.log_softmax(self._slot_logits(batch).float(), dim=-1)
        device = log_probs.device
        ids, weights = batch.ids.to(device), batch.weights.to(device)
        kept = batch.log_probs.to(device).exp().masked_fill(ids < 0, 0.0)
        guessed = log_probs.gather(-1, ids.clamp(min=0))
        rest = (1.0 - kept.sum(-1)).clamp(min=0.0)
        named = guessed.exp().masked_fill(ids < 0, 0.0).sum(-1)
        other = torch.log((1.0 - named).clamp(min=1e-6))
        entropy = -(torch.xlogy(kept, kept).sum(-1) + torch.xlogy(rest, rest))
        crossed = -((kept * guessed).sum(-1) + rest * other)
        total = weights.sum().clamp(min=1e-6)
        loss = ((crossed - entropy) * weights).sum() / total
        hits = (log_probs.argmax(-1) == ids[..., 0]) & (weights > 0)
        counted = (weights > 0).sum((0, 1)).clamp(min=1)
        shares = (hits.sum((0, 1)) / counted).tolist()
        return loss, {f"right_at_slot_{j}": share for j, share in enumerate(shares)}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the vectors and the settings."""
        save_checkpoint(
            folder,
            KIND,
            self._target,
            {"pads": self._module.pads},
            {"recipe": asdict(self._settings)},
        )

    def _batch(self, texts: Sequence[OwnText], generator: torch.Generator) -> UnitBatch:
        settings = self._settings
        width = max(len(text.tokens) for text in texts)
        tokens = torch.zeros(len(texts), width, dtype=torch.int64)
        points = torch.zeros(len(texts), settings.groups, dtype=torch.int64)
        slots = (len(texts), settings.groups, settings.num_pads)
        top_k = texts[0].top_ids.shape[1]
        if top_k == 0:
            raise ConfigError("lexical_unit learns the target's laws: the corpus needs a top_k")
        ids = torch.full((*slots, top_k), -1)
        log_probs = torch.full((*slots, top_k), -torch.inf)
        weights = torch.zeros(slots)
        for row, text in enumerate(texts):
            tokens[row, : len(text.tokens)] = text.tokens
            every = slot_weights(text, settings)
            places = torch.nonzero(every.sum(-1) > 0).flatten()
            order = torch.randperm(len(places), generator=generator)[: settings.groups]
            places = places[order].sort().values
            count = len(places)
            points[row, :count] = places
            weights[row, :count] = every[places]
            laws = places.unsqueeze(1) + 1 + torch.arange(settings.num_pads)
            laws = laws.clamp(max=len(text.tokens) - 1)
            ids[row, :count], log_probs[row, :count] = text.top_ids[laws], text.top_log_probs[laws]
        return UnitBatch(tokens, points, ids, log_probs, weights)

    def _slot_logits(self, batch: UnitBatch) -> Tensor:
        """Returns ``[B, G, g, V]`` logits, with gradients to the vectors."""
        size, width = batch.tokens.shape
        groups = batch.points.shape[1]
        cache = self._backend.new_cache(size, width)
        texts = torch.arange(width).expand(size, -1)
        with torch.no_grad():
            self._backend.forward(cache, batch.tokens, texts, None, keep=torch.tensor([0]))
        frozen = _FrozenCache(cache)
        pads = PadGroups(self._target, self._module.pads, self._backend.traits.positions)
        seen = torch.arange(width) <= batch.points.unsqueeze(-1)
        positions, ancestors = pads.behind(batch.points, seen)
        with pads.entering(groups), _without_gradients(self._target):
            logits = self._backend.forward(
                frozen, torch.zeros_like(positions), torch.cat([texts, positions], 1), ancestors
            )
        return logits.view(size, groups, pads.size, logits.shape[-1])


def make(target_model: Any, texts: Sequence[OwnText], /, **settings: Any) -> LexicalUnitRecipe:
    """Returns the recipe for a target; `settings` are those of `UnitSettings`.

    Raises:
        ConfigError: for a setting that there is not, or that makes no sense.
    """
    del texts  # what it needs of a text it reads as the text comes
    known = UnitSettings.__dataclass_fields__
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise ConfigError(f"lexical_unit has no settings {unknown}; it has {sorted(known)}")
    return LexicalUnitRecipe(target_model, UnitSettings(**settings))


def slot_weights(text: OwnText, settings: UnitSettings) -> Tensor:
    """Returns ``[T, g]``: what slot j counts if the last token that its group sees is token i.

    It stands for token i + 2 + j. It counts in full if that token and all from i + 2 on are in a
    unit, so that a draft may get so far; not at all where the target's law there was not kept.
    """
    length, slots = len(text.tokens), settings.num_pads
    known = text.top_ids[:, 0] >= 0
    follows = text.tokens.roll(-1).unsqueeze(1)  # the token each row's law is a guess at
    chances = text.top_log_probs.exp().masked_fill(text.top_ids != follows, 0.0).sum(1)
    sure = (chances > settings.alpha) & known
    weights = torch.zeros(length, slots)
    inside = torch.ones(length, dtype=torch.bool)
    for slot in range(slots):
        count = length - 1 - slot  # groups whose slot's law is in the text
        if count <= 0:
            break
        inside[:count] &= sure[1 + slot :]
        share = torch.where(inside[:count], 1.0, settings.outside) * settings.decay**slot
        weights[:count, slot] = share * known[1 + slot :]
    return weights


class _Slots(torch.nn.Module):
    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.pads = torch.nn.Parameter(vectors)


class _FrozenCache(TreeCache):
    """A filled cache, its nodes pending, behind which a pass may run that keeps its gradients."""

    def __init__(self, filled: TreeCache) -> None:
        super().__init__(filled.specs, filled.batch_size, 0)
        self.pending = filled.pending
        self.hf_cache = Cache(
            layers=[_FrozenLayer(self, *states) for states in filled.pending_states()]
        )

    def begin_pass(self, pass_size: int) -> None:
        """Prepares for a pass; its keys and values are not written anywhere."""
        self.pass_size = pass_size


class _FrozenLayer(CacheLayerMixin):
    """Keys and values of one layer that stay as they are."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: TreeCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._frozen = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the storage exists from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the frozen ones with the new ones behind them."""
        keys, values = self._frozen
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of slots attended over, and that they start at slot 0."""
        return self._cache.visible, 0

    def get_seq_length(self) -> int:
        """Returns the number of frozen slots."""
        return self._cache.pending

    def get_max_length(self) -> int:
        """Returns -1: there is no bound."""
        return -1


@contextmanager
def _without_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Has the model's own parameters want no gradients for a time."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


@torch.no_grad()
def _first_vectors(target: Any, settings: UnitSettings, device: torch.device) -> Tensor:
    """Returns ``[g, D]`` float32: the mean of the target's embeddings, and a little noise."""
    mean = mean_embedding(target, device).float()
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(settings.num_pads, len(mean), generator=generator).to(device)
    some = target.get_input_embeddings()(torch.arange(_SPREAD_OF, device=device))
    first: Tensor = mean + _INITIAL_NOISE * some.float().std() * noise
    return first
