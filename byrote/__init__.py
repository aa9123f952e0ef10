"""byrote: sparse language models that separate what is known by rote from what is worked out.

    model = byrote.Model(config)
    byrote.save(model, "folder")
    model, tokenizer = byrote.load("folder")

Importing byrote imports nothing else: PyTorch comes with the first name that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from byrote import errors

if TYPE_CHECKING:
    from byrote.checkpoint.local import load, save
    from byrote.model.config import ModelConfig
    from byrote.model.transformer import Model

__version__ = "0.1.0"
__all__ = ["Model", "ModelConfig", "__version__", "errors", "load", "save"]

_HOMES = {
    "Model": "byrote.model.transformer",
    "ModelConfig": "byrote.model.config",
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
