"""Trees for the eye: the networkx graph, the terminal, pictures, and the numbers they show."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import tiny
import torch
from rich.console import Console

from specdec import SpeculativeGenerator
from specdec.demo import _show_step
from specdec.errors import ConfigError, TreeError
from specdec.row_text import Step, TreeLogits
from specdec.trees import DraftTree
from specdec.trees.draw import draw_tree
from specdec.trees.figure import save_tree, tree_figure
from specdec.trees.layout import tidy_layout
from specdec.types import Draw, LawRows

NAN = math.nan
WORDS = ["root", " a", " b", " c", " d", " e", " own"]
#   0 ── 1 ── 3 ── 5        1, 3 and the target's own token (6) became text
#   │    └── 4
#   └─── 2
TREE = DraftTree.from_lists(
    [0, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 1, 3], chances=[NAN, 0.5, 0.25, 1.0, NAN, 0.001]
)
PATH = [1, 3]
TARGET = [1.0, 0.75, 0.125, NAN, 0.5, 0.0]
# a pass over a tree rounds otherwise than a pass over one token; these are float32 probabilities
ROUNDING = 2e-5


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    yield from tiny.one_thread()


def drawn_text(*arguments: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(draw_tree(*arguments))
    return console.file.getvalue()  # type: ignore[attr-defined]


def random_parents(nodes: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [-1, *(chance.randrange(max(0, node - 12), node) for node in range(1, nodes))]


# --------------------------------------------------------------------------- the graph


def test_the_graph_is_an_arborescence_with_the_trees_numbers() -> None:
    graph = TREE.to_networkx(WORDS.__getitem__, PATH, TARGET)
    assert nx.is_arborescence(graph)
    assert list(graph.nodes) == list(range(6))
    assert sorted(graph.edges) == [(0, 1), (0, 2), (1, 3), (1, 4), (3, 5)]
    assert graph.nodes[4] == {
        "token": 4,
        "text": " d",
        "depth": 2,
        "order": 1,
        "draw": "point",
        "draft_prob": None,
        "target_prob": 0.5,
        "accepted": False,
    }
    assert [graph.nodes[node]["accepted"] for node in graph] == [0, 1, 0, 1, 0, 0]
    assert [graph.nodes[node]["order"] for node in graph] == [0, 0, 1, 0, 1, 0]
    assert graph.nodes[3]["draft_prob"] == 1.0
    assert graph.nodes[3]["target_prob"] is None


def test_the_graph_becomes_json() -> None:
    law = LawRows(torch.tensor([[0.25, 0.75]]).log())
    tree = DraftTree.from_lists(
        [0, 1, 0], [-1, 0, 0], [Draw.POINT, Draw.WOR, Draw.WOR], [-1, 0, 0], law, [NAN, 0.75, 0.25]
    )
    for graph in (TREE.to_networkx(WORDS.__getitem__, PATH, TARGET), tree.to_networkx()):
        data = json.loads(json.dumps(nx.node_link_data(graph), allow_nan=False))
        assert nx.utils.graphs_equal(nx.node_link_graph(data), graph)
    assert [node["draw"] for node in data["nodes"]] == ["point", "wor", "wor"]
    assert [node["draft_prob"] for node in data["nodes"]] == [None, 0.75, 0.25]
    assert "text" not in data["nodes"][0]


def test_a_root_alone_is_a_graph() -> None:
    graph = DraftTree.root_only(7).to_networkx()
    assert nx.is_arborescence(graph)
    assert graph.nodes[0]["token"] == 7


@pytest.mark.parametrize("count", [1, 5, 7])
def test_probabilities_of_another_tree_are_refused(count: int) -> None:
    with pytest.raises(TreeError, match=rf"each of the 6 nodes.*got {count}"):
        TREE.to_networkx(target_probs=[1.0] * count)
    with pytest.raises(TreeError, match=rf"each of the 6 nodes.*got {count}"):
        draw_tree(TREE, PATH, str, target_probs=[1.0] * count)


# --------------------------------------------------------------------------- the target's numbers


def traced(model: Any, rows: Sequence[Sequence[int]]) -> list[Step]:
    """Steps of a sampled call: temperature and seed, so that raw and processed logits differ."""
    sampling = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.5, "seed": 5}
    batch = tiny.padded(rows)
    plain = SpeculativeGenerator(model, drafter=None).generate(**batch, **sampling)
    texts = plain[:, batch["input_ids"].shape[1] :].tolist()
    generator = SpeculativeGenerator(model, drafter=tiny.Oracle(texts, gap=7), node_budget=10)
    return list(generator.trace(**batch, **sampling))


def test_target_probs_are_the_models_own_before_any_processor() -> None:
    model = tiny.make_model("llama", seed=1)
    rows = [tiny.prompt(17, seed=1), tiny.prompt(6, seed=2)]
    written: list[list[int]] = [list(row) for row in rows]
    steps = traced(model, rows)
    for step in steps:
        probs, tree, text = step.target_probs(), step.tree, written[step.row]
        assert step.logits.shape == (len(tree), tiny.VOCAB)
        assert len(probs) == len(tree)
        assert probs[0] == 1.0
        for node, parent in enumerate(tree.parent_list[1:], start=1):
            with torch.no_grad():
                logits = model(tiny.ids(text + tree.path_tokens(parent))).logits[0, -1]
            expected = float(torch.softmax(logits, dim=-1)[tree.token_list[node]])
            assert probs[node] == pytest.approx(expected, abs=ROUNDING)
        text += step.tokens
    assert max(len(step.path) for step in steps) > 2
    # rows of a batch have trees of different sizes, padded to one width in the pass
    assert len({len(step.tree) for step in steps}) > 2


def test_the_prefill_has_a_root_and_its_logits() -> None:
    model = tiny.make_model("llama", seed=1)
    step = traced(model, [tiny.prompt(9)])[0]
    assert len(step.tree) == 1
    assert step.target_probs() == [1.0]
    with torch.no_grad():
        logits = model(tiny.ids(tiny.prompt(9))).logits[0, -1]
    torch.testing.assert_close(step.logits[0], logits, rtol=1e-4, atol=1e-4)


def test_half_precision_logits_give_probabilities() -> None:
    logits = torch.tensor([[9.0, -9.0, 9.0], [0.0, 0.0, -torch.inf]], dtype=torch.bfloat16)
    tree = DraftTree.from_lists([0, 2, 2], [-1, 0, 1])
    assert Step(0, [2], [], TreeLogits(tree, logits)).target_probs() == pytest.approx(
        [1.0, 0.5, 0.0]
    )


def test_a_text_that_ends_on_its_path_has_no_token_behind_it() -> None:
    logits = torch.zeros(6, 7)
    assert Step(0, [1, 3, 6], PATH, TreeLogits(TREE, logits)).next_token == 6
    assert Step(0, [1, 3], PATH, TreeLogits(TREE, logits)).next_token is None


# --------------------------------------------------------------------------- the terminal


def test_the_terminal_shows_both_numbers_where_they_are_known() -> None:
    lines = drawn_text(TREE, PATH, WORDS.__getitem__, 6, TARGET).splitlines()
    assert [re.sub(r"^[│├└─ ]+", "", line).strip() for line in lines] == [
        "root  draft → target probability",
        "·a ✓  .50 → .75",
        "·c ✓  1.0",
        "·e  <.01 → .00",
        "·own ← the target's own token",
        "·d  → .50",
        "·b  .25 → .12",
    ]


@pytest.mark.parametrize(
    ("tree", "target", "legend"),
    [
        (TREE, None, "root  draft probability"),
        (DraftTree.from_lists([0, 1], [-1, 0]), [1.0, 0.5], "root  → target probability"),
        (DraftTree.from_lists([0, 1], [-1, 0]), None, "root"),
        (DraftTree.root_only(0), [1.0], "root"),
    ],
)
def test_the_legend_names_what_is_shown(
    tree: DraftTree, target: list[float] | None, legend: str
) -> None:
    assert drawn_text(tree, [], WORDS.__getitem__, None, target).splitlines()[0].strip() == legend


def test_white_space_is_marked_and_control_characters_are_not_obeyed() -> None:
    texts = ["\n\t x", "", "\x1b[31m"]
    shown = drawn_text(DraftTree.from_lists([0, 1, 2], [-1, 0, 0]), [], texts.__getitem__)
    assert "⏎⇥·x" in shown
    assert "∅" in shown
    assert r"\x1b[31m" in shown
    assert "\x1b" not in shown


# --------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("nodes", [1, 2, 9, 65])
def test_leaves_have_rows_of_their_own_and_no_two_nodes_meet(nodes: int) -> None:
    for seed in range(5):
        parents = random_parents(nodes, seed)
        places = tidy_layout(parents)
        assert len(set(places)) == nodes
        children = [[c for c in range(nodes) if parents[c] == node] for node in range(nodes)]
        leaves = sorted(places[node].y for node in range(nodes) if not children[node])
        assert leaves == list(range(len(leaves)))
        for node, below in enumerate(children):
            if below:
                mean = sum(places[child].y for child in below) / len(below)
                assert places[node].y == pytest.approx(mean)
                assert {places[child].depth for child in below} == {places[node].depth + 1}
                heights = [places[child].y for child in below]
                assert heights == sorted(heights)


# --------------------------------------------------------------------------- pictures


def boxes(figure: Any) -> list[Any]:
    from matplotlib.patches import FancyBboxPatch

    return [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]


def edges(figure: Any) -> list[Any]:
    from matplotlib.patches import PathPatch

    return [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]


def test_the_accepted_path_is_green_and_thick_and_the_own_token_yellow() -> None:
    pytest.importorskip("matplotlib")
    figure = tree_figure(TREE, PATH, WORDS.__getitem__, 6, TARGET)

    def hue(colour: Sequence[float]) -> str:
        red, green, blue = colour[:3]
        if max(red, green, blue) - min(red, green, blue) < 0.1:
            return "grey"
        return "green" if green > red else "yellow"

    drawn = edges(figure)
    assert sorted(hue(edge.get_edgecolor()) for edge in drawn) == (
        ["green"] * 2 + ["grey"] * 3 + ["yellow"]
    )
    widths = {hue(edge.get_edgecolor()): edge.get_linewidth() for edge in drawn}
    assert widths["green"] > 2 * widths["grey"]
    # one box more of each colour stands in the legend
    colours = [hue(box.get_facecolor()) for box in boxes(figure)]
    assert (colours.count("green"), colours.count("yellow")) == (3, 2)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"root", "·a", "·own", ".50 → .75", "→ .50", "accepted"} <= set(texts)
    assert "numbers: draft → target probability" in texts


def test_boxes_do_not_touch_and_the_picture_grows_with_the_leaves() -> None:
    pytest.importorskip("matplotlib")
    heights = []
    for nodes in (9, 65):
        parents = random_parents(nodes, seed=nodes)
        tree = DraftTree.from_lists(list(range(nodes)), parents, chances=[0.5] * nodes)
        figure = tree_figure(tree, tree.path_to(nodes - 1), lambda t: "x" * (t % 30), 3)
        heights.append(figure.get_size_inches()[1])
        extents = [box.get_bbox() for box in boxes(figure)]
        assert len(extents) == nodes + 1 + 4
        assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))
        width, height = figure.get_size_inches()
        assert all(box.y1 < height for box in extents)
        assert all(box.x0 > 0 and box.x1 < width and box.y0 > 0 for box in extents)
    assert heights[1] > 2 * heights[0]


ODD = ["\n", "$x$ $\\frac$", "", "你好", "Привет", "\x1b[31m", "<b>&\"'", "\ufffd", "😀", "y" * 99]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", [".svg", ".png", ".SVG"])
def test_odd_tokens_do_not_break_a_file(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tree = DraftTree.from_lists(list(range(len(ODD))), random_parents(len(ODD), seed=2))
    file = tmp_path / f"tree{suffix}"
    save_tree(tree, tree.path_to(4), ODD.__getitem__, 1, file=file)
    if suffix == ".png":
        assert file.read_bytes().startswith(b"\x89PNG")
        return
    root = ElementTree.parse(file).getroot()
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"⏎", "$x$·$\\frac$", "∅", r"\u4f60\u597d", "Привет", r"\x1b[31m"} <= texts
    assert {"<b>&\"'", r"\U0001f600", "y" * 19 + "…"} <= texts


def test_the_same_tree_gives_the_same_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        save_tree(TREE, PATH, WORDS.__getitem__, 6, TARGET, file=str(file))
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("next_token", [None, 6])
def test_a_root_alone_is_a_picture(next_token: int | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tree = DraftTree.root_only(0)
    save_tree(tree, [], WORDS.__getitem__, next_token, [1.0], file=tmp_path / "root.png")
    figure = tree_figure(tree, [], WORDS.__getitem__, next_token, [1.0])
    assert len(edges(figure)) == (next_token is not None)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tree.pdf", r"\.svg or \.png, got 'tree\.pdf'"),
        ("tree", r"\.svg or \.png, got 'tree'"),
        ("no/such/tree.svg", "no folder 'no/such' to save 'tree.svg' in"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(file: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        save_tree(TREE, PATH, str, file=file)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install specdec-toolkit\[bench\]"):
        tree_figure(TREE, PATH, str)


def test_the_demo_shows_and_saves_a_real_step(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steps = traced(tiny.make_model("llama", seed=1), [tiny.prompt(17)])
    best = max(steps, key=lambda step: len(step.path))
    assert best.path
    console = Console(file=io.StringIO(), width=100)
    _show_step(console, tiny.letters(), best, tmp_path / "tree.svg")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("✓") == len(best.path)
    assert "draft → target probability" in printed
    assert "accepted" in (tmp_path / "tree.svg").read_text(encoding="utf-8")
