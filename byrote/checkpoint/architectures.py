"""The Hugging Face architectures that byrote reads and writes, each as what an exchange needs to know of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from byrote.checkpoint import v3_config, v4_config, v32_config
from byrote.checkpoint.v3_names import Piece, v3_pieces
from byrote.checkpoint.v4_names import v4_pieces, v4_saved
from byrote.checkpoint.v32_names import v32_pieces
from byrote.errors import ConfigError
from byrote.model.config import DSAConfig, MLAConfig, ModelConfig, V4AttentionConfig


class Architecture(NamedTuple):
    model_type: str
    name: str  # transformers' classes are nameConfig and nameForCausalLM
    read: Callable[[Mapping[str, Any]], ModelConfig]
    write: Callable[..., dict[str, Any]]  # (config, dtype, begin_id, end_id)
    check_expressible: Callable[[ModelConfig], None]
    ignored_keys: Callable[[Mapping[str, Any]], list[str]]
    layouts: Mapping[str, Callable[[ModelConfig], list[Piece]]]  # every tensor under the names of a vocabulary


RELEASE, TRANSFORMERS = "release", "transformers"  # DeepSeek's files · the state_dict of transformers' class, without MTP modules in V4


_V3 = Architecture(
    v3_config.MODEL_TYPE,
    "DeepseekV3",
    v3_config.config_from_v3,
    v3_config.config_to_v3,
    v3_config.check_expressible,
    v3_config.ignored_keys,
    {RELEASE: v3_pieces, TRANSFORMERS: partial(v3_pieces, stacked=True)},
)
_V32 = Architecture(
    v32_config.MODEL_TYPE,
    "DeepseekV32",
    v32_config.config_from_v32,
    v32_config.config_to_v32,
    v32_config.check_expressible,
    v32_config.ignored_keys,
    {RELEASE: v32_pieces, TRANSFORMERS: partial(v32_pieces, stacked=True)},
)
_V4 = Architecture(
    v4_config.MODEL_TYPE,
    "DeepseekV4",
    v4_config.config_from_v4,
    v4_config.config_to_v4,
    v4_config.check_expressible,
    v4_config.ignored_keys,
    {RELEASE: v4_pieces, TRANSFORMERS: partial(v4_pieces, stacked=True), "save_pretrained": v4_saved},
)
_BY_ATTENTION: dict[type, Architecture] = {MLAConfig: _V3, DSAConfig: _V32, V4AttentionConfig: _V4}
ARCHITECTURES = {architecture.model_type: architecture for architecture in _BY_ATTENTION.values()}


def reading(data: Mapping[str, Any]) -> Architecture:
    """That of a config.json. ConfigError for one byrote does not know."""
    if data.get("model_type") not in ARCHITECTURES:
        raise ConfigError(f"model_type is {data.get('model_type')!r}; byrote imports {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[data["model_type"]]


def writing(config: ModelConfig) -> Architecture:
    """That in which a model can be said, if its other parts can. ConfigError where blocks attend in ways no architecture has."""
    kinds = {type(config.attention_of(layer)) for layer in range(config.num_layers)}
    if len(kinds) > 1 or not kinds <= _BY_ATTENTION.keys():
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ConfigError(f"the blocks' attention is of kind {listed}, which no architecture that byrote writes has; byrote.save keeps it")
    return _BY_ATTENTION[kinds.pop()]
