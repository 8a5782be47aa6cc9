"""The report of a comparison: one HTML file with everything in it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from specdec.bench import figures
from specdec.bench.compare import Comparison, Measured
from specdec.bench.generation import BASELINE
from specdec.bench.summary import OVERALL, Summary
from specdec.bench.tables import interval_text

_TEMPLATE = "report.html.j2"


def render(comparison: Comparison) -> str:
    """Returns the report as HTML that needs no other file and no network.

    Raises:
        ConfigError: if jinja2 or matplotlib is not installed.
    """
    figures.require_packages("jinja2", "matplotlib")
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.globals["interval"] = interval_text
    template = environment.from_string(
        files("specdec.bench").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    )
    measured, setting = comparison.measured, comparison.setting
    overall = [s for s in measured.summaries if s.category == OVERALL]
    categories = list(dict.fromkeys(s.category for s in measured.summaries))
    return template.render(
        baseline=BASELINE,
        best=max(overall, key=lambda s: s.speedup),
        overall=overall,
        categories=categories if len(categories) > 2 else [],
        by_category={(s.category, s.method): s for s in measured.summaries},
        memory=measured.memory,
        setting=setting,
        facts=_facts(setting),
        command=shlex.join(setting["command"]),
        pictures=_pictures(comparison, overall),
    )


def _pictures(comparison: Comparison, overall: Sequence[Summary]) -> dict[str, str]:
    """Returns the figures as addresses of images; those of drafts only where there are drafts."""
    ratios = ratios_of(comparison.measured)
    drafted = {s.method: s for s in overall if s.counts.num_drafted}
    rivals = [name for name in ratios if name not in drafted]
    found = {"speed": figures.speed_ratios(ratios, BASELINE, rivals)}
    if drafted:
        counts = {name: s.counts for name, s in drafted.items()}
        dots = {
            name: figures.Dot(s.draft_ms or 0.0, s.block_efficiency) for name, s in drafted.items()
        }
        found |= {
            "cost": figures.draft_cost(dots),
            "depth": figures.acceptance_by_depth(counts),
            "lengths": figures.accepted_lengths(counts),
        }
    return {name: figures.data_uri(figure) for name, figure in found.items()}


def ratios_of(measured: Measured) -> dict[str, figures.Ratio]:
    """Returns the speed of each method but the baseline, over all prompts."""
    return {
        s.method: figures.Ratio(
            s.speedup,
            s.speedup_interval,
            [run.speedup for run in measured.runs if run.method == s.method],
        )
        for s in measured.summaries
        if s.category == OVERALL and s.method != BASELINE
    }


def _facts(setting: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns what the numbers depend on, as pairs of a name and a value."""
    model, prompts, machine = setting["model"], setting["prompts"], setting["hardware"]
    decoding, revision = setting["decoding"], setting["git"]
    how = "greedy"
    if decoding["do_sample"]:
        how = f"temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
    memory_gb = machine["memory_bytes"] / 1e9
    return [
        ("model", f"{model['name']}, {model['parameters'] / 1e6:.0f} M parameters"),
        ("weights", model["dtype"]),
        ("device", model["device"]),
        (
            "machine",
            f"{machine['machine']}, {machine['cores']} cores, threads used: {machine['threads']}, "
            f"{memory_gb:.0f} GB, {machine['system']}",
        ),
        (
            "prompts",
            f"{prompts['count']} in {prompts['categories']} categories, first turns, batch 1 "
            f"(SHA-256 {prompts['sha256'][:12]})",
        ),
        ("decoding", f"{how}, up to {decoding['max_new_tokens']} new tokens"),
        ("node budget", str(setting["node_budget"])),
        ("versions", ", ".join(f"{k} {v}" for k, v in setting["versions"].items())),
        (
            "revision",
            "not a checkout"
            if revision is None
            else revision["revision"][:12] + (", changed since" if revision["changed"] else ""),
        ),
        ("date", setting["begun"]),
        ("took", f"{setting['seconds'] / 60:.1f} minutes"),
    ]
