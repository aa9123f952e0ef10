"""C kernels for the CPU: compiled on the machine that runs them, at first use, and entirely optional.

A kernel folder holds `reference.py`, which is the definition, and may hold C sources for the same functions. `load` turns
such sources into a shared library with the system's compiler and opens it with ctypes. Where that cannot be done (no
compiler, a failed build, `BYROTE_NATIVE=0`) it returns None, the reference runs, and `status()` says why.

- Compiler: the first of `$CC`, cc, gcc, clang that can build for this processor.
- Cache: `$BYROTE_CACHE` or ~/.cache/byrote; a file's name carries the SHA-256 of sources, compiler version, flags, processor
  and OpenMP runtime. Libraries are built beside and renamed into place. A folder that cannot be written gives way to a
  private temporary one that ends with the process.
- Threads: PyTorch brings an OpenMP runtime, and a second one in the same process would fight with it over the cores. So we
  link against the very file PyTorch has mapped, or build without OpenMP. Kernels take the number of threads as an argument.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from byrote.errors import ConfigError

INCLUDE = Path(__file__).parent
BASE_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", f"-I{INCLUDE}")
TUNE_FLAGS = ("-march=native", "-mcpu=native", "")  # clang on ARM wants the second; the third always builds
BUILD_TIMEOUT_S = 120

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_libraries: dict[str, ctypes.CDLL | None] = {}
_outcomes: dict[str, str] = {}


class Toolchain(NamedTuple):
    """A compiler with the flags it accepts; `runtime` is PyTorch's OpenMP library, None for one thread."""

    compiler: str
    version: str
    flags: tuple[str, ...]
    runtime: Path | None


class BuildError(Exception):
    """Why a library could not be built; kept as the reason, never raised to the user."""


def load(name: str, sources: Sequence[Path]) -> ctypes.CDLL | None:
    """The library of `sources` (the .c files first, then the headers they include), or None where the reference must serve.

    Built once a machine and opened once a process. Raises ConfigError for a value of BYROTE_NATIVE other than 0 and 1.
    """
    if not is_enabled():
        return None
    with _lock:
        if name not in _libraries:
            try:
                _libraries[name], _outcomes[name] = _open(name, sources)
            except BuildError as error:
                _libraries[name], _outcomes[name] = None, str(error)
            _log.debug("native %s: %s", name, _outcomes[name])
        return _libraries[name]


def is_enabled() -> bool:
    """Whether the environment allows native kernels; raises ConfigError for a value that means nothing."""
    value = os.environ.get("BYROTE_NATIVE", "1")
    if value not in ("0", "1"):
        raise ConfigError(f"BYROTE_NATIVE is {value!r}; allowed: 1 (compile and use C kernels, the default) or 0 (PyTorch only)")
    return value == "1"


def status() -> dict[str, object]:
    """For `byrote doctor`: active, reason (when not), compiler, version, flags, threads' runtime, outcome per library."""
    report: dict[str, object] = {"active": False, "reason": "", "libraries": dict(_outcomes)}
    if not is_enabled():
        return report | {"reason": "switched off by BYROTE_NATIVE=0"}
    try:
        tools = toolchain()
    except BuildError as error:
        return report | {"reason": str(error)}
    failed = [f"{name}: {_outcomes[name]}" for name, library in _libraries.items() if library is None]
    return report | {
        "active": not failed,
        "reason": "; ".join(failed),
        "compiler": tools.compiler,
        "version": tools.version,
        "flags": " ".join(tools.flags),
        "openmp": "off (one thread)" if tools.runtime is None else str(tools.runtime),
    }


@functools.cache
def toolchain() -> Toolchain:
    """The first compiler and flags that build a small library here; with PyTorch's OpenMP where any of them can."""
    compilers = [path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (path := shutil.which(name))]
    if not compilers:
        raise BuildError("no C compiler: looked for $CC, cc, gcc and clang (Debian, Ubuntu: apt install gcc)")
    runtime = _torch_openmp()
    trials = [(compiler, tune, omp) for omp in ([runtime, None] if runtime else [None]) for compiler in compilers for tune in TUNE_FLAGS]
    for compiler, tune, omp in trials:
        flags = (*BASE_FLAGS, *filter(None, [tune]), *(["-fopenmp"] if omp else []))
        tools = Toolchain(compiler, _first_line([compiler, "--version"]), flags, omp)
        problem = _probe(tools)
        if not problem:
            return tools
    raise BuildError(f"{compilers[-1]} cannot build a shared library here: {problem}")


def _probe(tools: Toolchain) -> str:
    """Empty if `tools` build and open a library with one parallel loop, else what went wrong."""
    program = "int probe(int n) {int s = 0;\n#pragma omp parallel for reduction(+ : s)\nfor (int i = 0; i < n; i++) s += i;\nreturn s;}\n"
    with tempfile.TemporaryDirectory(prefix="byrote-") as folder:
        source = Path(folder, "probe.c")
        source.write_text(program)
        try:
            _compile(tools, [source], Path(folder, "probe.so"))
            ctypes.CDLL(str(Path(folder, "probe.so")))
        except (BuildError, OSError) as error:
            return str(error)
    return ""


def _open(name: str, sources: Sequence[Path]) -> tuple[ctypes.CDLL, str]:
    tools = toolchain()
    digest = hashlib.sha256(repr((tools, _processor())).encode())
    for source in sources:
        digest.update(source.read_bytes())
    problem = ""
    for folder in _cache_folders():
        path = folder / f"{name}-{digest.hexdigest()[:32]}.so"
        try:
            if not path.exists():
                _build(tools, [source for source in sources if source.suffix == ".c"], path)
            return ctypes.CDLL(str(path)), str(path)
        except OSError as error:  # read-only, full, or mounted without permission to execute: the next folder may do
            problem = f"{type(error).__name__}: {error}"
    raise BuildError(problem)


def _cache_folders() -> list[Path]:
    chosen = os.environ.get("BYROTE_CACHE")
    if chosen:
        return [Path(chosen), _private_folder()]
    try:
        return [Path.home() / ".cache" / "byrote", _private_folder()]
    except RuntimeError:  # no home folder at all
        return [_private_folder()]
