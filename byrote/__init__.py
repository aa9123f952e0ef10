"""byrote: sparse language models that separate what is known by rote from what is worked out.

    model = byrote.Model(config)
    byrote.save(model, "folder")
    model, tokenizer = byrote.load("folder")
    answers = byrote.LLM("folder").generate(["def main("])
    step = byrote.capture(model)          called like the model; decodes several times faster on a CPU

Importing byrote imports nothing else: PyTorch comes with the first name that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from byrote import errors

if TYPE_CHECKING:
    from byrote.checkpoint.local import load, save
    from byrote.engine.llm import LLM
    from byrote.engine.request import SamplingParams
    from byrote.model.capture import capture
    from byrote.model.config import ModelConfig
    from byrote.model.transformer import Model

__version__ = "0.1.0"
__all__ = ["LLM", "Model", "ModelConfig", "SamplingParams", "__version__", "capture", "errors", "load", "save"]

_HOMES = {
    "LLM": "byrote.engine.llm",
    "Model": "byrote.model.transformer",
    "ModelConfig": "byrote.model.config",
    "SamplingParams": "byrote.engine.request",
    "capture": "byrote.model.capture",
    "load": "byrote.checkpoint.local",
    "save": "byrote.checkpoint.local",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'byrote' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
