"""The model that is grafted upon: any Hugging Face causal LM, seen as what a graft needs of it, and its tokenizer.

Nothing here knows a model type. The decoder is what `get_decoder()` names; its blocks are the one list of modules that is as long as
the configuration says; width and vocabulary are those of the embedding. Weights are read from safetensors alone, and code that comes with a
model is never run.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byrote.checkpoint.huggingface import require_transformers
from byrote.errors import ConfigError
from byrote.memory.canonical import CanonicalVocab, canonical_ids
from byrote.memory.pack import fingerprint

_SAMPLED = 4096  # numbers of each weight that a fingerprint looks at


class Host(NamedTuple):
    """Where a graft takes hold."""

    decoder: nn.Module  # is called with input_ids; runs the blocks
    blocks: nn.ModuleList
    dim: int
    vocab_size: int


def find_host(model: nn.Module) -> Host:
    """Decoder, blocks and sizes of a transformers model. Raises ConfigError where they cannot be told."""
    if not callable(getattr(model, "get_decoder", None)) or not hasattr(model, "config"):
        raise ConfigError(
            f"a graft needs a transformers causal LM, got {type(model).__name__}; of a wrapped or compiled model give the one inside"
        )
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    embedding: Any = decoder.get_input_embeddings()
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr,operator]
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers]
    if len(lists) != 1:
        raise ConfigError(
            f"{type(decoder).__name__} has {len(lists)} lists of {num_layers} blocks where one is expected; this layout cannot be grafted"
        )
    return Host(decoder, lists[0], embedding.weight.shape[1], embedding.weight.shape[0])


def base_fingerprint(model: nn.Module) -> str:
    """Tells weights apart, and is the same for one checkpoint loaded in fp32 or bf16."""
    return fingerprint((name, _rounded(param)) for name, param in model.named_parameters())


def _rounded(param: Tensor) -> Tensor:
    flat = param.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLED)].to(torch.bfloat16)


def load_host(name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Any, "HostText"]:
    """(model in evaluation mode, its tokenizer) from a folder or a name on the hub. `dtype` None: as it was saved."""
    transformers = require_transformers()
    if not Path(name).is_dir() and (name.startswith((".", "~", "/")) or name.count("/") > 1):  # no name on the hub
        raise ConfigError(f"{name} is no folder. A graft takes a folder that transformers can load, or a name on the hub such as org/model")
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype="auto" if dtype is None else dtype
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{name} cannot be loaded: {str(error).rstrip('.')}. A graft takes a folder, or a name on the hub, with weights in "
            "safetensors, a tokenizer, and an architecture that transformers itself knows"
        ) from error
    return model.to(device).eval(), HostText(tokenizer)


class HostText:
    """A transformers tokenizer as byrote's data pipeline and scores want one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        known = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if token is not None]
        if not known:
            raise ConfigError("the tokenizer names no begin, end or padding token; set one (tokenizer.eos_token = …) and save it again")
        self.begin_id: int = known[0]
        self.end_id: int = known[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.pad_id: int = known[-1]

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without begin and end; characters that look like a special token are just characters."""
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """SHA-256 of what decides which ids a text gets."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        facts = dict(self.tokenizer.get_vocab()) if backend is None else json.loads(backend.to_str())
        settings = {name: value for name, value in facts.items() if backend is None or name not in ("padding", "truncation")}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def canonical(self, vocab_size: int) -> CanonicalVocab:
        """The class of every id of the model, whose embedding may have more rows than the tokenizer has tokens."""
        strings = [token or "" for token in self.tokenizer.convert_ids_to_tokens(range(self.vocab_size))]
        texts = [self.decode([token]) for token in range(self.vocab_size)]
        unused = [""] * (vocab_size - self.vocab_size)
        return canonical_ids(texts + unused, strings + unused)
