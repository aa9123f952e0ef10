"""Tensors to and from safetensors files, without a second copy of anything large in memory.

The format (huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header {name: {dtype, shape,
data_offsets}}, the numbers behind one another. Reading is the library's, which maps the file into memory. Writing is done here, piece
by piece: the library's writer wants all tensors on the CPU at once, makes files that only their owner may read, and reports a full
disk as a sentence.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from byrote.errors import CheckpointError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGN = 64  # numbers start at a multiple of this in the file, and so in memory when it is mapped
_PIECE = 1 << 26  # bytes brought to the CPU at a time


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file that holds `tensors`, which may lie on any device, and `metadata` in its header."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # widest first keeps all aligned
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor_bytes(tensor)
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield from _pieces(tensor.detach())


def tensor_bytes(tensor: Tensor) -> int:
    """Size of its numbers in a file."""
    return tensor.numel() * tensor.element_size()


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    for piece in tensor.reshape(-1).split(_PIECE // tensor.element_size()):
        yield piece.cpu().view(torch.uint8).numpy().data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped: a page is read when it is touched, and copied when it is written to."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Restore the checkpoint from a copy") from error


def expect(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, *, same_dtype: bool = True) -> None:
    """Raise CheckpointError unless `tensors` have the names, shapes and dtypes of `wanted`."""
    for name in sorted({*tensors, *wanted}):
        if name not in tensors or name not in wanted:
            raise CheckpointError(f"{what}: {name} is {'missing' if name in wanted else 'not part of this model'}")
        got, need = tensors[name], wanted[name]
        if got.shape != need.shape or (same_dtype and got.dtype != need.dtype):
            raise CheckpointError(f"{what}: {name} is {_shown(got)}; the model needs {_shown(need)}")


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
