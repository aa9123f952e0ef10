"""Which tensors of a folder hold FP8 or FP4 codes, and where their scales are. (The codes themselves: `kernels/scaled_blocks.py`.)

    X.weight   F8_E4M3  [O, I]       scale [⌈O/R⌉, ⌈I/C⌉]    R × C is `weight_block_size` of config.json's quantization_config
    X.weight   I8       [O, I / 2]   scale [O, ⌈I/32⌉]       packed E2M1: the routed experts of V4
    scale      F32, BF16 or F8_E8M0, called X.weight_scale_inv (V3, V3.2, transformers) or X.scale (V4)

A weight's dtype says that it is coded; config.json's lists of modules are not needed to read it. Decoded it is in config.json's
`torch_dtype`, bfloat16 where there is none.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byrote.checkpoint.runs import listing
from byrote.checkpoint.safetensors_folder import DTYPES, Header
from byrote.errors import CheckpointError, ConfigError
from byrote.kernels.scaled_blocks import FP4_BLOCK, dequantize

KEY = "quantization_config"
CODES = {"F8_E4M3": 1, "I8": 2}  # numbers in a byte
_SCALES = ("F32", "BF16", "F8_E8M0")
_ALLOWED: dict[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("ue8m0", "float", None),
    "expert_dtype": ("fp4", "fp8", None),
}
_WITHOUT_EFFECT = ("dequantize", "modules_to_not_convert", "modules_to_convert", "ignored_layers")


class Quantization(NamedTuple):
    """What config.json says of coded weights."""

    block: tuple[int, int]  # rows and columns that share an FP8 scale
    dtype: str  # to decode to, in the words of safetensors


class Coded(NamedTuple):
    """How one weight is decoded."""

    scale: str  # the tensor that holds its scales …
    file: str  # … and the file that holds this
    block: tuple[int, int]
    dtype: torch.dtype

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return dequantize(codes, scale, self.block, self.dtype)


def quantization(data: Mapping[str, Any]) -> Quantization | None:
    """That of a config.json, if any. ConfigError names a field whose value byrote does not know."""
    given = data.get(KEY)
    if given is None:
        return None
    if not isinstance(given, dict) or "quant_method" not in given:
        raise ConfigError(f"{KEY} is {given!r}; it must be an object that has a quant_method")
    odd = [f"{KEY}.{key} is {value!r}; byrote reads {_words(_ALLOWED[key])}" for key, value in given.items() if not _is_known(key, value)]
    block = given.get("weight_block_size", [128, 128])
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        odd.append(f"{KEY}.weight_block_size is {block!r}; it must be two whole numbers above 0, such as [128, 128]")
    unknown = [key for key in given if key not in _ALLOWED.keys() | {"weight_block_size", *_WITHOUT_EFFECT}]
    odd += [f"{KEY}.{key} is {given[key]!r}, and byrote does not know this field" for key in unknown]
    if odd:
        raise ConfigError(f"the weights cannot be read. {'; '.join(odd)}. Convert them to bfloat16 with the tools they came from")
    return Quantization((block[0], block[1]), _dtype(data))


def _is_known(key: str, value: object) -> bool:
    return key not in _ALLOWED or value in _ALLOWED[key]


def _words(allowed: tuple[object, ...]) -> str:
    return " or ".join(repr(value) for value in allowed if value is not None)


def _dtype(data: Mapping[str, Any]) -> str:
    key = "dtype" if data.get("dtype") is not None else "torch_dtype"
    name = "bfloat16" if data.get(key) is None else data[key]
    known = {str(dtype).removeprefix("torch."): word for word, dtype in DTYPES.items()}
    if name not in known:
        raise ConfigError(f"{key} is {name!r}; coded weights are decoded to {' or '.join(known)}")
    return known[name]


def decoded(
    headers: Mapping[str, Header], known: Collection[str], data: Mapping[str, Any], where: str
) -> tuple[dict[str, Header], dict[str, Coded]]:
    """(headers as the model meets them: decoded, without scales; weight → how to decode it).

    `known` are the names the model has. CheckpointError for a scale without its weight, a weight without its scale, or sizes that do not
    fit; ConfigError if config.json does not say how the codes are to be read.
    """
    form = quantization(data)
    scales = {name: scale for name in known for scale in _scale_names(name) if scale in headers and scale not in known}
    codes = sorted(name for name in known if name in headers and headers[name].dtype in CODES)
    problems = [problem for name, scale in scales.items() for problem in _lonely(name, scale, headers)]
    problems += [f"{name} is {headers[name].dtype} and has no {' or '.join(_scale_names(name))}" for name in codes if name not in scales]
    if problems:
        raise CheckpointError(
            f"coded weights of {where} and their scales do not fit: {listing(problems)}; copy or download the folder again"
        )
    if form is None and codes:
        published = '{"quant_method": "fp8", "weight_block_size": [128, 128]}'
        raise ConfigError(
            f"{where} has coded weights ({codes[0]} …) and config.json no {KEY}; add the one that was published, such as {published}"
        )
    ways = {} if form is None else {name: _way(headers[name], scales[name], headers, form) for name in codes}
    wrong = [problem for name, way in ways.items() for problem in _misfits(name, headers[name], way, headers[way.scale])]
    if wrong:
        raise CheckpointError(f"the scales of {where} do not fit: {listing(wrong)}; check {KEY}.weight_block_size in config.json")
    taken = {way.scale for way in ways.values()}
    return {name: _plain(header, form) if name in ways else header for name, header in headers.items() if name not in taken}, ways


def _scale_names(name: str) -> tuple[str, ...]:
    """What the scale of `name` may be called."""
    return (f"{name}_scale_inv", *([name.removesuffix("weight") + "scale"] if name.endswith(".weight") else []))


def _lonely(name: str, scale: str, headers: Mapping[str, Header]) -> Iterator[str]:
    if name not in headers:
        yield f"{scale} is there and {name} is missing"
    elif headers[name].dtype not in CODES:
        yield f"{scale} is there and {name} is {headers[name].dtype}, which needs none"


def _way(header: Header, scale: str, headers: Mapping[str, Header], form: Quantization) -> Coded:
    return Coded(scale, headers[scale].file, form.block if header.dtype == "F8_E4M3" else FP4_BLOCK, DTYPES[form.dtype])


def _plain(header: Header, form: Quantization | None) -> Header:
    assert form is not None, "nothing is coded without it"
    return Header(header.file, (*header.shape[:-1], header.shape[-1] * CODES[header.dtype]), form.dtype)


def _misfits(name: str, header: Header, way: Coded, scale: Header) -> Iterator[str]:
    if len(header.shape) < 2:
        yield f"{name} is {header.dtype} and has shape {header.shape}, where a matrix is needed"
        return
    *front, rows, columns = header.shape
    want = (*front, -(-rows // way.block[0]), -(-columns * CODES[header.dtype] // way.block[1]))
    if scale.shape != want:
        yield f"{way.scale} has shape {scale.shape}, and {name} {header.shape} in blocks of {way.block} needs {want}"
    if scale.dtype not in _SCALES:
        yield f"{way.scale} is {scale.dtype}, not {' or '.join(_SCALES)}"
