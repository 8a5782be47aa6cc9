"""A production drafter where toys stand, so that the law of its text can be enumerated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.testing.toys import Tokens
from specdec.types import DraftContext, Drafter, LawRows, TargetInfo


class DrafterDraft:
    """Stands where `ToyDraft` stands: a drafter of one row, each of its laws computed once.

    Enumeration runs the same steps again and again, and demands the same laws each time; so what a
    drafter learns from `observe` is not part of it.

    Args:
        drafter: answers from the text alone.
        target: what it is attached to.
        prompt: what its row begins with.

    Attributes:
        known: the laws so far, ``[V]`` float64, by committed text and path of draft nodes.
    """

    def __init__(self, drafter: Drafter, target: TargetInfo, prompt: Sequence[int]) -> None:
        drafter.attach(target)
        drafter.start(0, prompt, None)
        self._drafter = drafter
        self._prompt = prompt
        self.known: dict[tuple[Tokens, Tokens], Tensor] = {}

    def law(self, prefix: Tokens) -> DrafterDraftLaw:
        """Returns the law to grow a tree from, the last token of `prefix` being the root."""
        return DrafterDraftLaw(self, prefix)

    def row(self, prefix: Tokens, path: Tokens) -> Tensor:
        """Returns ``[V]`` float64 log-probabilities at the end of a path of draft nodes."""
        if (prefix, path) not in self.known:
            # texts come in no order here; a drafter that has read one row's text wants it to grow
            self._drafter.stop(0)
            self._drafter.start(0, self._prompt, None)
            law, handle = self._drafter.law(DraftContext(0, prefix, remaining=9)), 0
            (rows,) = self._drafter.expand([(law, [0])])
            for token in path:
                handle = law.extend(handle, token)
                (rows,) = self._drafter.expand([(law, [handle])])
            self.known[prefix, path] = rows.log_probs[0].double()
        return self.known[prefix, path]


class DrafterDraftLaw:
    """A `DraftLaw` over the laws of a `DrafterDraft`."""

    def __init__(self, draft: DrafterDraft, prefix: Tokens) -> None:
        self._draft = draft
        self._prefix = prefix
        self._paths: list[Tokens] = [()]

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        self._paths.append((*self._paths[parent], token))
        return len(self._paths) - 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns the law at each handle."""
        return LawRows(
            torch.stack([self._draft.row(self._prefix, self._paths[h]) for h in handles])
        )
