"""C kernels for the CPU: compiled on the machine that runs them, at first use, and entirely optional.

A kernel folder holds `reference.py`, which is the definition, and may hold C sources for the same functions. `load` turns
such sources into a shared library with the system's compiler and opens it with ctypes. Where that cannot be done (no
compiler, a failed build, `BYROTE_NATIVE=0`) it returns None, the reference runs, and `status()` says why.

- Compiler: the first of `$CC`, cc, gcc, clang that can build for this processor.
- Cache: `$BYROTE_CACHE` or ~/.cache/byrote; a file's name carries the SHA-256 of sources, compiler versions, flags, processor
  and OpenMP runtime. Libraries are built beside and renamed into place. A folder that cannot be used gives way to a private
  temporary one that ends with the process.
- Threads: PyTorch brings an OpenMP runtime, and a second one in the same process would fight with it over the cores. So we
  link against the very file PyTorch has mapped, or build without OpenMP. Kernels take the number of threads as an argument.
"""

import atexit
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from byrote.errors import ConfigError

INCLUDE = Path(__file__).parent
BASE_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")  # NaN and infinity keep their meaning
TUNE_FLAGS = ("-march=native", "-mcpu=native", "")  # clang on some processors knows only the second; the third always builds
BUILD_TIMEOUT_S = 120
WORTH_A_THREAD = 1 << 15  # numbers; a pass over fewer ends before a second thread has begun

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_outcomes: dict[str, "Outcome"] = {}


class Toolchain(NamedTuple):
    """A compiler with flags to try; `runtime` is PyTorch's OpenMP library, None for one thread."""

    compiler: str
    version: str
    flags: tuple[str, ...]
    runtime: Path | None


class Outcome(NamedTuple):
    """What became of one library: it is open, or there is a reason."""

    library: ctypes.CDLL | None
    tools: Toolchain | None = None
    path: Path | None = None
    reason: str = ""


class BuildError(Exception):
    """Why a library could not be built; kept as the reason, never raised to the user."""


def load(name: str, sources: Sequence[Path], functions: Mapping[str, Sequence[type]]) -> ctypes.CDLL | None:
    """The library of `sources` (.c files and the headers they include), or None where the reference must serve.

    `functions` gives the argument types of each function in it; all return an int. Built once a machine, opened once a
    process. Raises ConfigError for a value of BYROTE_NATIVE other than 0 and 1.
    """
    if not is_enabled():
        return None
    with _lock:
        if name not in _outcomes:
            _outcomes[name] = outcome = _open(name, sources)
            for function, argument_types in functions.items() if outcome.library else ():
                getattr(outcome.library, function).argtypes = argument_types
            _log.debug("native %s: %s", name, outcome.path or outcome.reason)
        return _outcomes[name].library


def can_take(*tensors: Tensor) -> bool:
    """Whether C code may follow the addresses of these: real memory of this machine, and nobody is tracing."""
    return all(tensor.device.type == "cpu" and tensor.layout == torch.strided for tensor in tensors) and not torch.compiler.is_compiling()


def address(tensor: Tensor | None) -> int | None:
    """Where the numbers of a contiguous tensor begin; None becomes C's NULL."""
    assert tensor is None or tensor.is_contiguous(), "a kernel was handed a tensor with gaps; call contiguous() first"
    return None if tensor is None else tensor.data_ptr()


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to hear of a call with these inputs; without it a kernel runs at a third of the overhead."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def rows(x: Tensor) -> Tensor:
    """x as [N, D] over its last dim, each row without gaps; a copy only where the rows cannot be reached by one stride."""
    rows_ND = x.reshape(-1, x.shape[-1])
    return rows_ND if rows_ND.stride(1) == 1 else rows_ND.contiguous()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Room for a kernel's result, whatever PyTorch's default device and dtype are set to."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def threads_for(numbers: int) -> int:
    """Threads worth waking for one pass over so many numbers: PyTorch's setting, but one for little work."""
    return torch.get_num_threads() if numbers >= WORTH_A_THREAD else 1


def check(code: int) -> None:
    """Raises MemoryError unless a kernel returned 0."""
    if code:
        raise MemoryError("a native kernel could not allocate its work space; free memory, lower the batch or set BYROTE_NATIVE=0")


def is_enabled() -> bool:
    """Whether the environment allows native kernels; raises ConfigError for a value that means nothing."""
    value = os.environ.get("BYROTE_NATIVE", "1")
    if value not in ("0", "1"):
        raise ConfigError(f"BYROTE_NATIVE is {value!r}; allowed: 1 (compile and use C kernels, the default) or 0 (PyTorch only)")
    return value == "1"


def status() -> dict[str, object]:
    """For `byrote doctor`: active, reason (empty when active), compiler, flags, openmp, threads, and the library files.

    Builds a five-line probe, so that it answers before any kernel ran; `threads` is how many took part in its loop.
    """
    probe = load("probe", [INCLUDE / "probe.c"], {"probe_threads": [ctypes.c_int]})
    if probe is None and not is_enabled():
        return {"active": False, "reason": "switched off by BYROTE_NATIVE=0"}
    failed = [f"{name}: {outcome.reason}" for name, outcome in _outcomes.items() if outcome.reason]
    tools = _outcomes["probe"].tools
    if probe is None or tools is None:
        return {"active": False, "reason": "; ".join(failed)}
    return {
        "active": not failed,
        "reason": "; ".join(failed),
        "compiler": f"{tools.compiler} ({tools.version})",
        "flags": " ".join(tools.flags),
        "openmp": str(tools.runtime or "off"),
        "threads": probe.probe_threads(torch.get_num_threads()),
        "libraries": {name: str(outcome.path) for name, outcome in _outcomes.items() if outcome.path},
    }


def _open(name: str, sources: Sequence[Path]) -> Outcome:
    """Opens what an earlier process left in the cache, else builds: with PyTorch's OpenMP if any compiler can."""
    trials = _toolchains()
    content = b"".join([repr((trials, _processor())).encode(), *(source.read_bytes() for source in sources)])
    paths = [f"{name}-{hashlib.sha256(content + repr(tools).encode()).hexdigest()[:32]}.so" for tools in trials]
    reason = "no C compiler: looked for $CC, cc, gcc and clang; install one (Debian, Ubuntu: apt install gcc) or go on without"
    for build in (False, True):
        for tools, file in zip(trials, paths, strict=True):
            try:
                if outcome := _open_with(tools, file, sources, build):
                    return outcome
            except BuildError as error:
                reason = str(error)
    return Outcome(None, reason=reason)


def _open_with(tools: Toolchain, file: str, sources: Sequence[Path], build: bool) -> Outcome | None:
    problem = ""
    for folder in _cache_folders(build):
        try:
            path = folder / file
            if build:
                _build(tools, sources, path)
            if path.exists():
                return Outcome(ctypes.CDLL(str(path)), tools, path)
        except OSError as error:  # read-only, full, or mounted without permission to execute: the next folder may do
            problem = f"{type(error).__name__}: {error}"
    if problem and build:
        raise BuildError(problem)
    return None


def _build(tools: Toolchain, sources: Sequence[Path], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
        objects = []
        for source in (source for source in sources if source.suffix == ".c"):
            objects.append(f"{folder}/{source.stem}.o")
            _run([tools.compiler, *tools.flags, f"-I{INCLUDE}", "-c", str(source), "-o", objects[-1]])
        openmp = [] if tools.runtime is None else ["-Wl,-z,defs", str(tools.runtime)]
        _run([tools.compiler, "-shared", *objects, *openmp, "-lm", "-o", f"{folder}/library.so"])
        os.replace(f"{folder}/library.so", path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=BUILD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


@functools.cache
def _toolchains() -> tuple[Toolchain, ...]:
    """Every compiler and set of flags worth trying, best first."""
    paths = [shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name]
    compilers = {}
    for path in paths:
        try:
            compilers.update({path: _run([path, "--version"]).partition("\n")[0]} if path else {})
        except BuildError:
            continue  # not a compiler; the next one may be
    runtime = _torch_openmp()
    return tuple(
        Toolchain(path, version, (*BASE_FLAGS, *filter(None, [tune]), *(["-fopenmp"] if openmp else [])), openmp)
        for openmp in ([runtime, None] if runtime else [None])
        for path, version in compilers.items()
        for tune in TUNE_FLAGS
    )


def _torch_openmp() -> Path | None:
    """The OpenMP library mapped into this process, PyTorch's own before any other; None where the system does not tell."""
    try:
        mapped = {Path(line.split(maxsplit=5)[5].strip()) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    except OSError:
        return None
    home = Path(torch.__file__).parent
    found = [path for path in mapped if path.name.startswith(("libgomp", "libiomp5", "libomp")) and path.exists()]
    return min(found, key=lambda path: (not path.is_relative_to(home), str(path)), default=None)


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on: model and feature flags, without clock rates and the like."""
    wanted = ("model name", "flags", "features", "cpu implementer", "cpu part", "isa")
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip().lower() in wanted]
    return "\n".join([platform.machine(), platform.processor(), *lines])


def _cache_folders(build: bool) -> Iterator[Path]:
    chosen = os.environ.get("BYROTE_CACHE") or os.path.expanduser("~/.cache/byrote")
    if not chosen.startswith("~"):  # else there is no home folder at all
        yield Path(chosen)
    if build:
        yield _private_folder()


@functools.cache
def _private_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="byrote-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
