"""The cells of a sweep: one run each, spanned by a grid, its names checked beforehand."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from specdec.bench.acceptance import make_policy
from specdec.bench.drafters import NO_DRAFTER, check_drafter
from specdec.bench.grid import SCALARS, Grid
from specdec.build import build_verifier, check_draws
from specdec.errors import ConfigError
from specdec.pretrained import DEMO

# letters of a hash: with 16**12 names, some thousand cells never share one
_KEY_LENGTH = 12


@dataclass(frozen=True, slots=True)
class SweepCell:
    """One run: everything that its tokens depend on, but the machine and the versions.

    Attributes:
        model: name or path of the target, "demo" for the demo model.
        drafter: as in `Grid`.
        policy: as in `Grid`; "auto" for plain decoding, which has none.
        verifier: as in `Grid`.
        temperature: 0 is greedy.
        node_budget: draft nodes a tree or "auto"; 0 for plain decoding.
        max_depth: the deepest level of a tree, None for no bound but the budget.
        batch_size: prompts a call.
        seed: of the run; every prompt and turn has one made of it.
        prompts: the prompt file as it was named.
        prompts_sha256: `specdec.prompts.digest` of all its prompts.
        limit: prompts taken, spread over the categories; None for all.
        max_turns: turns taken of each conversation; None for all.
        max_new_tokens: tokens a turn.
        top_p: nucleus; 1 for none. Without effect at temperature 0.
        dtype: of the target's weights, "auto" for float32 on a CPU and the model's own elsewhere.
        packed_weights: see `SpeculativeGenerator`; "none" for the layers as they are.
    """

    model: str
    drafter: str
    policy: str
    verifier: str
    temperature: float
    node_budget: int | str
    max_depth: int | None
    batch_size: int
    seed: int
    prompts: str
    prompts_sha256: str
    limit: int | None
    max_turns: int | None
    max_new_tokens: int
    top_p: float
    dtype: str
    packed_weights: str

    @property
    def key(self) -> str:
        """The cell's name in files: the same for the same run, wherever the prompt file lies."""
        identity = asdict(self)
        del identity["prompts"]
        if self.max_turns is None:  # as cells were named before there was such a bound
            del identity["max_turns"]
        text = json.dumps(identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]

    @property
    def label(self) -> str:
        """What a reader tells cells apart by; Spec-Bench's `model_id`."""
        depth = "" if self.max_depth is None else f"-d{self.max_depth}"
        return (
            f"{self.model.rstrip('/').rpartition('/')[2]}-{self.drafter}-{self.policy}-"
            f"{self.verifier}-temp-{self.temperature:g}-n{self.node_budget}{depth}-"
            f"b{self.batch_size}-seed{self.seed}"
        )


def span(
    grid: Grid, digests: Mapping[str, str]
) -> tuple[list[SweepCell], list[tuple[str, str, str]]]:
    """Returns the cells of a grid, and the pairs it names that do not go together.

    Cells that would be the same run are one cell: plain decoding has no policy and no budget.

    Args:
        grid: its names must be known; an unknown policy or verifier raises ConfigError.
        digests: `specdec.prompts.digest` of each prompt file.

    Returns:
        The cells in order, those of a model together; and (policy, verifier, reason) of each pair
        that would not be lossless.
    """
    misfits = {
        (policy, verifier): reason
        for policy, verifier in itertools.product(grid.policies, grid.verifiers)
        if (reason := _misfit(policy, verifier))
    }
    cells: dict[str, SweepCell] = {}
    left_out: dict[tuple[str, str], str] = {}
    axes = itertools.product(
        grid.models, grid.prompts, grid.drafters, grid.policies, grid.verifiers, grid.temperatures
    )
    sizes = list(
        itertools.product(grid.node_budgets, grid.max_depths, grid.batch_sizes, grid.seeds)
    )
    for model, prompts, drafter, policy, verifier, temperature in axes:
        plain = drafter == NO_DRAFTER
        if not plain and (policy, verifier) in misfits:
            left_out[policy, verifier] = misfits[policy, verifier]
            continue
        for node_budget, max_depth, batch_size, seed in sizes:
            cell = SweepCell(
                model=model,
                drafter=drafter,
                policy="auto" if plain else policy,
                verifier=verifier,
                temperature=float(temperature),
                node_budget=0 if plain else node_budget,
                max_depth=None if plain else max_depth,
                batch_size=batch_size,
                seed=seed,
                prompts=prompts,
                prompts_sha256=digests[prompts],
                **{name: getattr(grid, name) for name in SCALARS},
            )
            cells.setdefault(cell.key, cell)
    return list(cells.values()), [(*pair, reason) for pair, reason in left_out.items()]


def _misfit(policy: str, verifier: str) -> str:
    if "auto" in (policy, verifier):
        return ""
    if verifier == "block" and not policy.startswith("chain"):
        return "verifier 'block' is for chains"
    try:
        check_draws(make_policy(policy), build_verifier(verifier))
    except ConfigError as error:
        return str(error)
    return ""


def check_names(grid: Grid) -> None:
    """Checks every name that a cell would look up, before the first one runs.

    Raises:
        ConfigError: for an unknown drafter, policy, verifier or model; all that are known stand in
            the message.
    """
    for policy in grid.policies:
        if policy != "auto":
            make_policy(policy)
        elif any(depth is not None for depth in grid.max_depths):
            raise ConfigError("max_depths needs policies by name: 'auto' is chosen in each call")
    for verifier in grid.verifiers:
        if verifier != "auto":
            build_verifier(verifier)
    drafts = [model for drafter in grid.drafters for model in check_drafter(drafter)]
    _check_models(dict.fromkeys([*drafts, *grid.models]))


def _check_models(models: Iterable[str]) -> None:
    from transformers import AutoConfig

    from specdec.demo_model import ensure_demo_model
    from specdec.wheel_model import DemoModelError

    for model in models:
        try:
            if model == DEMO:
                ensure_demo_model()
                continue
            AutoConfig.from_pretrained(model)
        except (OSError, ValueError, DemoModelError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"model {model!r} cannot be loaded: {reason}") from error
