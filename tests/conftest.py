"""What every test stands on: an offline hub, a fixed number of threads, the demo model."""

from __future__ import annotations

import os

# before anything imports huggingface_hub or tokenizers, which read these once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# before a test defines a Triton kernel: without a GPU, kernels run in the interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pytest_configure(config: pytest.Config) -> None:
    """One thread per worker under xdist, where the workers share the cores."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    """A test may change torch's number of threads; the next one finds it as it was."""
    num_threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def _same_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Automatic budgets go by one table of costs, whatever the machine and its load."""
    from specdec import generator
    from specdec.cost import PassCost

    table = PassCost(rows=(1, 65), contexts=(64,), seconds=((1.0, 1.5),))
    monkeypatch.setattr(generator, "pass_cost", lambda backend: table)


@pytest.fixture(params=["native", "python"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and their laws stand in C, and in Python as where there is no compiler."""
    from specdec.kernels import drafting

    if request.param == "python":
        monkeypatch.setattr(drafting, "serves", lambda: False)
    elif not drafting.serves():
        pytest.skip("no C compiler")


@pytest.fixture
def small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers are packed however small they are: those of tiny models too."""
    from specdec.backend import packed

    monkeypatch.setattr(packed, "_SMALLEST", 1)


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where kernels are tested: a GPU runs them natively, unless TRITON_INTERPRET is set."""
    native = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0"
    return torch.device("cuda" if native else "cpu")


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched on first use; mark its tests `model`."""
    from specdec.demo_model import ensure_demo_model

    return ensure_demo_model()


@pytest.fixture(scope="session")
def smollm2(demo_model_path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo model (float32, eval) and its tokenizer; shared, so a test leaves both as found."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(demo_model_path)
