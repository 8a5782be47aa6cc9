"""The one place that maps names to parts. Heavy imports happen inside."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from specdec.errors import ConfigError
from specdec.types import Drafter, Draw, TreePolicy, Verifier


def _drafter(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import specdec.drafters as drafters

        return getattr(drafters, name)()

    return make


def _small_model() -> Any:
    raise ConfigError(
        "the small_model drafter needs a model: pass the object "
        "specdec.drafters.SmallModel(draft_model) instead of the name, with "
        "tokenizer=draft_tokenizer if that is not the target's"
    )


def _masked_diffusion() -> Any:
    raise ConfigError(
        "the masked_diffusion drafter needs a model: pass the object "
        "specdec.drafters.MaskedDiffusion(draft_model) instead of the name"
    )


def _hybrid(weights: str | None = None) -> Any:
    from specdec.drafters import Hybrid, Suffix, Trigram

    # the suffix source reads the prompt already; the target's guesses behind each of its tokens
    # took a third of a long prefill and brought no token more
    return Hybrid([Suffix(), Trigram(prompt_rows=False, weights=weights)])


def _policy(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import specdec.trees as trees

        return getattr(trees, name)()

    return make


def _verifier(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import specdec.verifiers as verifiers

        return getattr(verifiers, name)()

    return make


DRAFTERS: dict[str, Callable[[], Any]] = {
    "diffusion": _drafter("Diffusion"),
    "early_exit": _drafter("EarlyExit"),
    "hybrid": _hybrid,
    "lexical_unit": _drafter("LexicalUnit"),
    "masked_diffusion": _masked_diffusion,
    "prompt_lookup": _drafter("PromptLookup"),
    "small_model": _small_model,
    "student": _drafter("Student"),
    "suffix": _drafter("Suffix"),
    "token_recycling": _drafter("TokenRecycling"),
    "trigram": _drafter("Trigram"),
}
POLICIES: dict[str, Callable[[], Any]] = {
    "best_first": _policy("BestFirst"),
    "chain": _policy("Chain"),
    "coupled_best_first": _policy("CoupledBestFirst"),
    "dyspec": _policy("DySpec"),
    "dyspec_layered": _policy("DySpecLayered"),
    "dyspec_threshold": _policy("DySpecThreshold"),
    "iid": _policy("Iid"),
    "marginals": _policy("Marginals"),
    "monte_carlo": _policy("MonteCarlo"),
    "rsd_c": _policy("RsdC"),
    "rsd_s": _policy("RsdS"),
    "sampled_plus_top": _policy("SampledPlusTop"),
    "sequoia": _policy("Sequoia"),
    "static": _policy("Static"),
    "stem": _policy("Stem"),
    "top_n": _policy("TopN"),
}
VERIFIERS: dict[str, Callable[[], Any]] = {
    "block": _verifier("Block"),
    "coupled": _verifier("Coupled"),
    "match": _verifier("Match"),
    "rejection": _verifier("Rejection"),
    "spectr": _verifier("SpecTr"),
    "traversal": _verifier("Traversal"),
}


def _auto_drafter() -> Any:
    """Returns what "auto" means for the drafter; `specdec.auto` fits policy and verifier to it."""
    return _hybrid(weights="shipped")


def build_drafter(spec: str | Drafter | None) -> Drafter | None:
    """Returns the drafter for a name or an object; None stays None: plain decoding.

    Raises:
        ConfigError: if no drafter has that name; the message lists those that exist.
    """
    part: Drafter | None = _build("drafter", spec, DRAFTERS, Drafter)
    return part


def drafter_names() -> list[str]:
    """Returns the names of all drafters, other packages' among them; some need an argument."""
    return sorted({*DRAFTERS, *_plugins("drafter")})


def build_policy(spec: str | TreePolicy) -> TreePolicy:
    """Returns the policy for a name or an object. Raises ConfigError for an unknown name."""
    part: TreePolicy = _build("policy", spec, POLICIES, TreePolicy)
    return part


def build_verifier(spec: str | Verifier) -> Verifier:
    """Returns the verifier for a name or an object. Raises ConfigError for an unknown name."""
    part: Verifier = _build("verifier", spec, VERIFIERS, Verifier)
    return part


def check_draws(policy: TreePolicy, verifier: Verifier) -> None:
    """Raises ConfigError if the verifier is not exact for the laws of the policy's nodes."""
    refused = policy.draws - verifier.accepts
    if refused:
        fitting = [n for n, make in VERIFIERS.items() if policy.draws <= make().accepts]
        raise ConfigError(
            f"policy {policy.name!r} makes nodes drawn as {names_of(refused)}, for which verifier "
            f"{verifier.name!r} (exact for {names_of(verifier.accepts)}) would not be lossless; "
            f"use verifier={' or '.join(map(repr, fitting))}"
        )


def names_of(draws: Collection[Draw]) -> str:
    """Returns draw laws as the errors name them."""
    return ", ".join(draw.name.lower() for draw in sorted(draws))


def _build(kind: str, spec: Any, known: dict[str, Callable[[], Any]], protocol: type) -> Any:
    if spec is None:
        if kind == "drafter":
            return None
        raise ConfigError(f"{kind} must be a name or an object, got None")
    if not isinstance(spec, str):
        if isinstance(spec, protocol):
            return spec
        raise ConfigError(
            f"{kind} must be a name or an object with the members of specdec.types."
            f"{protocol.__name__}, got {type(spec).__name__}"
        )
    if (kind, spec) == ("drafter", "auto"):
        return _auto_drafter()
    name = spec
    if name in known:
        return known[name]()
    plugins = _plugins(kind)
    if name in plugins:
        return _build(kind, plugins[name].load()(), known, protocol)
    if "." in name:
        return _build(kind, _named(kind, name)(), known, protocol)
    names = ", ".join(sorted({"auto", *known, *plugins}))
    raise ConfigError(
        f"unknown {kind} {spec!r}; known are: {names}, and classes of yours as package.module.Class"
    )


def _named(kind: str, path: str) -> Callable[[], Any]:
    """Returns the class with such a path, or whatever makes the part."""
    module, _, name = path.rpartition(".")
    try:
        make: Callable[[], Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{kind} {path!r} cannot be imported ({error}); expected package.module.Class"
        ) from error
    return make


def _plugins(kind: str) -> dict[str, EntryPoint]:
    group = "specdec.policies" if kind == "policy" else f"specdec.{kind}s"
    return {entry.name: entry for entry in entry_points(group=group)}
