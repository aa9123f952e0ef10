"""Which device to compute on, what the machine can do, and whether a big job fits before it starts.

Facts are read where the operating system keeps them (no extra package); inside a container its memory limit counts, not
the host's. `matmul_peak` is the yardstick behind every "share of peak" that byrote prints: measured here and now, because
a laptop's data sheet does not know its cooling.
"""

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from byrote.errors import CapacityError, ConfigError

GIB = 1024**3
CONTROL_GROUP = Path("/sys/fs/cgroup")  # version 2; a container sees its own limit here
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD = -3, -1, -2  # glibc's malloc.h


def available_devices() -> list[str]:
    """Names that `pick_device` accepts on this machine, the fastest first."""
    found = ["cuda"] if torch.cuda.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    return [*found, "cpu"]


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the fastest one there is. "cuda:1" names one of several.

    Raises ConfigError naming the devices of this machine.
    """
    present = available_devices()
    if name == "auto":
        return torch.device(present[0])
    kind, _, index = name.partition(":")
    too_many = bool(index) and (kind != "cuda" or not index.isdigit() or int(index) >= torch.cuda.device_count())
    if kind not in present or too_many:
        raise ConfigError(f"device {name!r} is not available; this machine has: auto, {', '.join(present)}. {_why_missing(kind)}".rstrip())
    return torch.device(name)


def _why_missing(kind: str) -> str:
    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f"The installed torch {torch.__version__} is a build without CUDA; `make setup TORCH=cuda` installs one with it."
    if kind == "cuda":
        return "torch has CUDA support but sees no such device; `nvidia-smi` should list it."
    return "mps needs macOS on Apple silicon." if kind == "mps" else ""


def autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it in hardware or at fp32 speed; float32 (run without autocast) where it would crawl."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        fast = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Measured FLOP/s of a `size`³ matrix product: the median of `repeats`, after one product to warm up."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    seconds = [_timed_product(left, right) for _ in range(repeats + 1)][1:]
    return 2.0 * size**3 / statistics.median(seconds)


def _timed_product(left: torch.Tensor, right: torch.Tensor) -> float:
    _synchronize(left.device)
    start = time.perf_counter()
    left @ right
    _synchronize(left.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what this process frees, for the next step to use again; True where that took effect.

    A training step allocates and frees the same large tensors each time. By default each goes back to the kernel and comes anew as
    zeroed pages: some 8,000 page faults a step of the bench model. The process then stays as large as its largest moment.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all((mallopt(_M_MMAP_THRESHOLD, 1 << 30), mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1), mallopt(_M_TOP_PAD, 64 << 20)))


def give_back_freed_memory() -> None:
    """Let glibc's allocator hand to the kernel what this process has freed, also where it was told to keep it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def machine_facts(device: torch.device | None = None, path: str | os.PathLike[str] = ".") -> dict[str, Any]:
    """What a measured number must carry: processor, cores, RAM and disk in bytes (disk at `path`), versions, device name."""
    device = pick_device("auto") if device is None else device
    total, free = memory_bytes()
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "ram_bytes": total,
        "ram_free_bytes": free,
        "disk_free_bytes": disk_free(path),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
    }


def usable_cores() -> int:
    """Cores this process may run on, which a container or `taskset` can make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_disk(path: str | os.PathLike[str], need_bytes: int, what: str) -> None:
    """Raise CapacityError unless the disk that holds (or will hold) `path` has `need_bytes` free for `what`."""
    free = disk_free(path)
    if free < need_bytes:
        raise CapacityError(
            f"{what} needs {need_bytes / GIB:.2f} GiB of disk at {os.fspath(path)}, and {free / GIB:.2f} GiB are free; "
            "free some space or choose a folder on another disk"
        )


def check_memory(need_bytes: int, what: str) -> None:
    """Raise CapacityError unless `need_bytes` of RAM are free for `what`."""
    total, free = memory_bytes()
    if free < need_bytes:
        raise CapacityError(
            f"{what} needs {need_bytes / GIB:.2f} GiB of RAM, and {free / GIB:.2f} of {total / GIB:.2f} GiB are free; "
            "close other programs or choose a smaller size"
        )


def disk_free(path: str | os.PathLike[str]) -> int:
    """Bytes free where `path` lies or would be made."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def memory_bytes() -> tuple[int, int]:
    """(total, free) bytes of RAM, within the limit of the control group where there is one."""
    total, free = _system_memory()
    limit = _first_number(CONTROL_GROUP / "memory.max")
    if limit is None or limit >= total:
        return total, free
    return limit, max(0, min(free, limit - _control_group_used()))


def _control_group_used() -> int:
    """Bytes charged to the control group, less the file cache that the kernel gives up when asked."""
    lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
    cache = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return (_first_number(CONTROL_GROUP / "memory.current") or 0) - cache


def _system_memory() -> tuple[int, int]:
    if Path("/proc/meminfo").exists():
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
        return kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemFree"]) * 1024
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, _macos_free_bytes(total)


def _macos_free_bytes(total: int) -> int:
    """Free, inactive and purgeable pages: what macOS hands out before it swaps. `total` where `vm_stat` cannot tell."""
    kinds = ("Pages free", "Pages inactive", "Pages purgeable", "Pages speculative")
    counts = [line.rpartition(":")[2].strip(" .") for line in _output_of("vm_stat").splitlines() if line.startswith(kinds)]
    return sum(int(count) for count in counts) * os.sysconf("SC_PAGE_SIZE") if counts else total


def _first_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control groups here, or the word "max": no limit
        return None


def _cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return _output_of("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.processor() or platform.machine()


def _output_of(*command: str) -> str:
    """What `command` prints, or nothing where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
