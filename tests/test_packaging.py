"""Guards of the layout: what is shipped, what an import loads, and who may import whom."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("specdec", "trees", "drafters", "verifiers", "kernels", "assets")


def read_setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def lines_of(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip()]


def module_name(path: Path) -> str:
    """Returns the import name of a file of ours: kernels/philox.py is specdec.kernels.philox."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "specdec":
        parts.insert(0, "specdec")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def run_python(code: str, **environment: str) -> Any:
    """Returns what ``code`` prints as JSON, run in a fresh process at the root of the checkout."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# what is shipped


def test_every_package_is_listed_in_setup_cfg() -> None:
    """A folder that is not listed is dropped from the wheel without a warning."""
    listed = lines_of(read_setup_cfg()["options"]["packages"])
    assert len(listed) == len(set(listed))
    assert {module_name(path.with_name("__init__.py")) for path in source_files()} == set(listed)


def test_what_is_no_python_is_package_data() -> None:
    """C sources, templates and weights too are dropped from the wheel without a warning."""
    patterns = [
        f"{package}/{pattern.strip()}"
        for package, value in read_setup_cfg()["options.package_data"].items()
        for pattern in value.split(",")
    ]
    others = {
        f"{module_name(path.parent / '__init__.py')}/{path.name}"
        for folder in ("kernels", "specdec", "trees", "drafters", "verifiers")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix not in {".py", ".pyc"} and "egg-info" not in path.as_posix()
    }
    assert "specdec.kernels/block_linear.c" in others
    assert [name for name in others if not any(fnmatch(name, own) for own in patterns)] == []


def test_every_package_but_kernels_has_an_init() -> None:
    folders = {path.parent for path in source_files()}
    without = {folder.relative_to(ROOT).as_posix() for folder in folders} - {
        path.parent.relative_to(ROOT).as_posix()
        for path in source_files()
        if path.name == "__init__.py"
    }
    assert without <= {"kernels"}


def test_kernels_has_no_init() -> None:
    """With one, a checkout as working folder would hide HuggingFace's package `kernels`."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_package_dir_names_the_folders_of_the_root() -> None:
    mapping = dict(
        re.split(r"\s*=\s*", line) for line in lines_of(read_setup_cfg()["options"]["package_dir"])
    )
    assert mapping == {"specdec": "specdec"} | {f"specdec.{name}": name for name in FOLDERS[1:]}


def test_version_is_one() -> None:
    import specdec

    assert read_setup_cfg()["metadata"]["version"] == specdec.__version__


def test_constraints_pin_what_make_installs() -> None:
    config = read_setup_cfg()
    required = lines_of(config["options"]["install_requires"])
    for extra in ("dev", "demo"):
        required += lines_of(config["options.extras_require"][extra])
    names = {re.split(r"[\s<>=!;\[]", line)[0].lower() for line in required}
    pins = [
        line
        for line in lines_of((ROOT / "constraints.txt").read_text(encoding="utf-8"))
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9_-]+==[0-9.]+", pin) for pin in pins)
    assert names <= {pin.partition("==")[0] for pin in pins}


# what an import loads


def test_import_of_trees_is_light() -> None:
    loaded = run_python(
        "import json, sys, specdec.trees.figure; print(json.dumps(sorted(sys.modules)))"
    )
    assert not {"transformers", "triton", "matplotlib"} & set(loaded)


def test_checkout_as_working_folder_does_not_offer_kernels_to_transformers() -> None:
    kernel = next(path for path in source_files() if path.parent == ROOT / "kernels")
    available, file = run_python(
        "import importlib, json, sys\n"
        f"importlib.import_module({module_name(kernel)!r})\n"
        "import transformers.integrations.hub_kernels\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "kernels = sys.modules.get('kernels')\n"
        "file = getattr(kernels, '__file__', None)\n"
        "print(json.dumps([is_kernels_available(), file]))"
    )
    assert file is None or not Path(file).is_relative_to(ROOT / "kernels")
    # either HuggingFace's own is installed, or there is none
    assert available is False or file is not None


def test_installed_kernels_wins_over_the_folder_of_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    kernel = next(path for path in source_files() if path.parent == ROOT / "kernels")
    # the working folder stands before PYTHONPATH, as it stands before site-packages
    file = run_python(
        "import importlib, json, kernels\n"
        f"importlib.import_module({module_name(kernel)!r})\n"
        "print(json.dumps(kernels.__file__))",
        PYTHONPATH=str(tmp_path),
    )
    assert Path(file) == tmp_path / "kernels" / "__init__.py"


# who may import whom

LEAVES = {
    "errors", "prefill", "random", "sampling", "stats", "stopping", "top_tokens", "types",
}  # fmt: skip
MAY_IMPORT = {
    "cache_dir": set[str](),
    "kernels": {"cache_dir"},
    "leaves": {"cache_dir", "kernels"},
    "trees": {"kernels", "leaves"},
    "backend": {"kernels", "leaves"},
    "drafters": {"kernels", "leaves", "trees", "backend"},
    "verifiers": {"kernels", "leaves", "trees", "backend"},
    "target": {"kernels", "leaves", "trees", "backend"},
    "front": {
        "cache_dir", "kernels", "leaves", "trees", "backend", "drafters", "verifiers", "target",
    },
}  # fmt: skip


def layer_of(module: str) -> str:
    """Returns the layer of ``specdec.x.y``; what has no layer of its own is the front door."""
    part = [*module.split("."), ""][1]
    if part in LEAVES:
        return "leaves"
    return part if part in MAY_IMPORT else "front"


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yields the full name of every import, those that only a type checker sees left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for alternative in node.orelse:
                yield from imported_modules(ast.Module([alternative], []))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from specdec import stats` means a module, `from specdec.stats import X` mostly not
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from names if base == "specdec" else [base]
        else:
            yield from imported_modules(node)


def breaches(module: str, source: str) -> list[str]:
    """Returns the imports of ``source`` that its place in the layers forbids."""
    own = layer_of(module)
    found = []
    for name in imported_modules(ast.parse(source)):
        top, _, rest = name.partition(".")
        if top in {"tests", "scripts", *FOLDERS[1:], ""}:
            # relative, or bare: a top-level `kernels` is HuggingFace's
            found.append(name)
        elif top == "specdec":
            layer = layer_of(name)
            if rest.split(".")[0] in {"tests", "scripts"} or layer not in MAY_IMPORT[own] | {own}:
                found.append(name)
    return found


@pytest.mark.parametrize("path", source_files(), ids=lambda path: module_name(path))
def test_imports_point_downward(path: Path) -> None:
    assert breaches(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.kernels.philox", "from specdec.errors import TreeError"),
        ("specdec.kernels.philox", "def f():\n    import specdec.random"),
        ("specdec.random", "from specdec.trees.tree import DraftTree"),
        ("specdec.stats", "from specdec import SpeculativeGenerator"),
        ("specdec.trees.tree", "import specdec.backend.cache"),
        ("specdec.backend.cache", "from specdec.target import TargetModel"),
        ("specdec.drafters.table", "from specdec.verifiers.match import Match"),
        ("specdec.drafters.table", "from specdec import verifiers"),
        ("specdec.verifiers.match", "from specdec.drafters import Table"),
        ("specdec.target", "from specdec.drafters import Table"),
        ("specdec.drafters.table", "from specdec.build import drafter"),
        ("specdec.trees.tree", "from . import build"),
        ("specdec.trees.tree", "from trees import build"),
        ("specdec.cli", "import kernels.philox"),
        ("specdec.cli", "from specdec.tests import conftest"),
        ("specdec.cli", "from scripts import bench"),
    ],
)
def test_a_breach_is_noticed(module: str, source: str) -> None:
    assert len(breaches(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("specdec.random", "from specdec.kernels.philox import keyed_gumbel"),
        ("specdec.types", "if TYPE_CHECKING:\n    from specdec.trees.tree import DraftTree"),
        ("specdec.stats", "from specdec import errors"),
        ("specdec.drafters.table", "from specdec.trees.tree import DraftTree"),
        ("specdec.generator", "from specdec.drafters import Table\nimport kernelsmith"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert breaches(module, source) == []
