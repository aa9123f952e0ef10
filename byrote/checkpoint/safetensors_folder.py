"""A folder of safetensors files, as Hugging Face lays them out.

    model.safetensors                                    one file, or
    model-00001-of-00003.safetensors …                   several, and
    model.safetensors.index.json                         which tensor lies in which of them

Headers are read first, so that names, shapes and dtypes are checked before the first number is. Nothing is unpickled.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from byrote.checkpoint.atomic import write_new
from byrote.checkpoint.runs import listing
from byrote.checkpoint.tensors import tensor_bytes, tensor_file
from byrote.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of weights
WHOLE_DTYPES = {"I64": torch.int64}  # of tables of ids
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_LFS_POINTER = b"version https://git-lfs"


class Header(NamedTuple):
    """What a file says about one of its tensors."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # in the words of safetensors: "F32", "BF16", …


# --- reading ----------------------------------------------------------------------------------------------------------


def read_headers(folder: Path, report: Callable[[str], None]) -> dict[str, Header]:
    """Name → header of every tensor; `report` hears how far it is.

    CheckpointError for a missing or damaged file, or an index that does not fit its files.
    """
    files, placed = _files(folder)
    headers: dict[str, Header] = {}
    for number, file in enumerate(files, start=1):
        report(f"reading the header of {file} ({number} of {len(files)})")
        for name, header in _file_headers(folder, file).items():
            if name in headers:
                raise CheckpointError(f"{name} lies in {headers[name].file} and in {file} of {folder}; keep one of the two")
            headers[name] = header
    wrong = sorted(name for name, file in placed.items() if name not in headers or headers[name].file != file)
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} does not fit its files: {listing(wrong)} not where it says; copy or download the folder again"
        )
    return headers


def stream(
    folder: Path, headers: Mapping[str, Header], beside: Mapping[str, tuple[str, str]] | None = None
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, tensor on the CPU, the one beside it), file by file: one file is mapped at a time, or two where the other lies elsewhere.

    `beside` is name → (file, name) of what is read together with it.
    """
    in_order = sorted(headers, key=lambda name: headers[name].file)
    for file, names in itertools.groupby(in_order, lambda name: headers[name].file):
        with _opened(folder / file) as weights:
            for name in names:
                yield name, weights.get_tensor(name), _beside(folder, file, weights, (beside or {}).get(name))


def _beside(folder: Path, open_file: str, weights: Any, place: tuple[str, str] | None) -> Tensor | None:
    if place is None or place[0] == open_file:
        return None if place is None else weights.get_tensor(place[1])
    with _opened(folder / place[0]) as others:
        return others.get_tensor(place[1])


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError says what is wrong with the file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; is {file.parent} a folder with a Hugging Face model?") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}; copy or download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}, not a JSON object; copy or download it again")
    return data


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """(weight files, name → file as the index has it, empty without an index)."""
    if (folder / INDEX).exists():
        placed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map from names to files; copy or download it again")
        outside = {file for file in placed.values() if Path(file).name != file}
        if outside:
            raise CheckpointError(f"{folder / INDEX} names {listing(outside)}, outside of the folder; byrote reads only files inside it")
        return sorted(set(placed.values())), placed
    if (folder / WEIGHTS).exists():
        return [WEIGHTS], {}
    raise CheckpointError(_nothing_to_read(folder))


def _nothing_to_read(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return (
            f"{folder} has its weights in {listing(pickled)}. Such files can run code when they are opened, and byrote never unpickles; "
            "where you trust their source, load them with transformers and save_pretrained into a new folder, which writes safetensors"
        )
    if any(name.endswith(".safetensors") for name in names):
        return f"{folder} has no {INDEX}, which says what lies in which of its files; download it too"
    return f"{folder} has neither {WEIGHTS} nor {INDEX} (it holds: {listing(names) or 'nothing'}); download the weights too"


def _file_headers(folder: Path, file: str) -> dict[str, Header]:
    with _opened(folder / file) as weights:
        parts = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (no mapping: it cannot be iterated)
        return {name: Header(file, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as weights:
            yield weights
    except (OSError, SafetensorError) as error:
        if file.is_file() and file.open("rb").read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(f"{file} is Git LFS's note of a file, not the file; fetch it: git lfs pull") from None
        raise CheckpointError(f"{file} is missing or damaged ({error}); copy or download it again") from None


# --- writing ----------------------------------------------------------------------------------------------------------


def shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors in files of at most `max_bytes`, in order; one larger than that has a file to itself."""
    files: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if files[-1] and used + tensor_bytes(tensor) > max_bytes:
            files.append({})
            used = 0
        files[-1][name] = tensor
        used += tensor_bytes(tensor)
    return files


def file_names(count: int) -> list[str]:
    """What the weight files of a model in `count` shards are called."""
    return [WEIGHTS] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_shards(folder: Path, files: list[dict[str, Tensor]], report: Callable[[str], None]) -> None:
    """Write the weight files, and the index if there is more than one, into a folder that has neither."""
    names = file_names(len(files))
    for number, (name, tensors) in enumerate(zip(names, files, strict=True), start=1):
        report(f"writing {name} ({number} of {len(files)})")
        write_new(folder / name, tensor_file(tensors, metadata={"format": "pt"}))
    if len(files) > 1:
        total = sum(tensor_bytes(tensor) for tensors in files for tensor in tensors.values())
        placed = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Create `file`, indented for people to read."""
    write_new(file, [(json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()])
