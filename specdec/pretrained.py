"""Loads models by name, as commands and sweeps want them."""

from __future__ import annotations

from typing import Any

DEMO = "demo"  # the demo model, wherever its files lie


def load_model(
    name: str | None = None, *, device: Any = None, dtype: str = "auto"
) -> tuple[Any, Any]:
    """Returns a model in eval mode and its tokenizer.

    Args:
        name: name or path; the demo model, fetched on first use, for None or "demo".
        device: of the model; a GPU where there is one, for None.
        dtype: of the weights; "auto" is float32 on a CPU and the model's own elsewhere.

    Raises:
        OSError: if there is no such model.
        DemoModelError: if the demo model cannot be fetched.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from specdec.demo_model import ensure_demo_model

    path = str(ensure_demo_model()) if name in (None, DEMO) else name
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = "float32" if dtype == "auto" and device.type == "cpu" else dtype
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    return model.to(device).eval(), tokenizer
