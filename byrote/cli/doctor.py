"""`byrote doctor`: can byrote work here, how fast, and what would make it faster?

Each check is one line: ok, note (works, could be better) or FAIL (byrote cannot work), with what to do next. Nothing is
installed or changed. Everything beyond the standard library is imported inside a check, because the doctor must be able to
say that it is missing.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from byrote.console import format_bytes, format_count, print_table
from byrote.errors import ByroteError

HELP = "check Python, PyTorch, devices, memory, disk and compiled paths; say what to do about each problem"

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)
ESSENTIAL = ("numpy", "safetensors", "tokenizers", "jinja2")
EXTRAS = {  # extra of pyproject.toml → (what it is for, what it installs)
    "hf": ("import and export of Hugging Face models", ("transformers>=5.17",)),
    "graft": ("memory on Hugging Face models, and LoRA to compare it with", ("transformers>=5.17", "peft")),
    "data": ("parquet files and Hugging Face datasets", ("datasets", "pyarrow")),
    "plots": ("plots as image files", ("matplotlib",)),
    "tensorboard": ("TensorBoard logs", ("tensorboard",)),
    "serve": ("the HTTP server", ("fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20")),
    "grammar": ("answers that follow a JSON schema or a grammar", ("xgrammar>=0.1.20",)),
    "gpu": ("Triton kernels on NVIDIA and AMD GPUs", ("triton>=3.6",)),
}
WORK_BYTES = 2 * 1024**3  # RAM, and disk, that `byrote quickstart` stays within
SLOW_DISK = 5_000  # rows a second: a step of tiny_cpu with a cold cache would wait three seconds

Grade = Literal["ok", "note", "FAIL"]


class Finding(NamedTuple):
    grade: Grade
    topic: str
    text: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--path", default=".", help="folder whose disk is checked (default: the current one)")


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 when something essential is wrong, else 0."""
    findings = list(examine(args.path))
    failed = [finding for finding in findings if finding.grade == "FAIL"]
    if args.json:
        print(json.dumps({"healthy": not failed, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        print_table([(finding.grade, finding.topic, finding.text) for finding in findings])
        for finding in findings:
            if finding.advice:
                print(f"\n{finding.topic}: {finding.advice}")
        print(f"\n{len(failed)} of {len(findings)} checks failed" if failed else "\nbyrote can work here")
    return 1 if failed else 0


def examine(path: str) -> Iterator[Finding]:
    """All findings, cheapest first. A check that needs torch is left out where torch does not import."""
    yield check_python()
    torch_found = check_torch()
    yield torch_found
    yield from check_essentials()
    if torch_found.grade != "FAIL":
        yield from check_machine(path)
        yield from check_devices()
        yield check_compiled_paths()
    yield from check_extras()


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("FAIL", "python", version, "byrote needs Python 3.11 or later; `make setup PYTHON=python3.12` uses another one")
    return Finding("ok", "python", f"{version} ({sys.executable})")


def check_torch() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library of torch does not load
        return Finding("FAIL", "torch", f"does not import: {error}", install_advice("torch>=2.11"))
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        return Finding("FAIL", "torch", torch.__version__, f"byrote needs torch 2.11 or later. {install_advice('torch>=2.11')}")
    return Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_essentials() -> Iterator[Finding]:
    for name in ESSENTIAL:
        if importlib.util.find_spec(name) is None:
            yield Finding("FAIL", name, "not installed", install_advice(name))
        else:
            yield Finding("ok", name, importlib.metadata.version(name))


def check_machine(path: str) -> Iterator[Finding]:
    from byrote.device import machine_facts

    facts = machine_facts(path=path)
    yield Finding("ok", "machine", f"{facts['cpu']}, {facts['cores']} cores usable, {facts['system']}")
    ram, disk = facts["ram_free_bytes"], facts["disk_free_bytes"]
    yield room("ram", ram, f"of {format_bytes(facts['ram_bytes'])}", "close other programs, or the system may kill a run")
    yield room("disk", disk, f"at {os.path.abspath(path)}", "free some space, or write runs to another disk with --out")
    yield check_table_disk(path)


def check_table_disk(path: str) -> Finding:
    """What `--table.store disk` would find here."""
    from byrote.memory.disk_rate import measure_reads

    topic, advice = "table disk", "keep tables that are larger than RAM on a local SSD: --table.folder, or runs by --out"
    try:
        rate = measure_reads(Path(path))
    except OSError as error:
        return Finding(
            "note", topic, f"cannot be tried: {error.strerror} ({os.path.abspath(path)})", "give a folder you may write to: --path"
        )
    if rate is None:
        return Finding("note", topic, "cannot be tried: this system lets nobody drop its page cache")
    return Finding(
        "ok" if rate >= SLOW_DISK else "note", topic, f"{rate:,.0f} rows a second from disk, in any order", advice * (rate < SLOW_DISK)
    )


def room(topic: str, free: int, where: str, advice: str) -> Finding:
    text = f"{format_bytes(free)} free {where}"
    if free < WORK_BYTES:
        return Finding("note", topic, text, f"less than {format_bytes(WORK_BYTES)}: {advice}")
    return Finding("ok", topic, text)


def check_devices() -> Iterator[Finding]:
    from byrote.device import autocast_dtype, available_devices, matmul_peak, pick_device

    for name in available_devices():
        device, topic = pick_device(name), f"device {name}"
        dtype = autocast_dtype(device)
        try:
            peak = matmul_peak(device, dtype, size=1024)
        except RuntimeError as error:  # the device is listed and does not compute
            yield Finding("FAIL", topic, f"fails on a matrix product: {error}", "update its driver, or choose another one with --device")
            continue
        yield Finding("ok", topic, f"computes in {str(dtype).removeprefix('torch.')}: {format_count(peak)}FLOP/s on 1024³ matrix products")


def check_compiled_paths() -> Finding:
    """Kernels in C are compiled at first use where there is a compiler; without one the references compute the same."""
    try:
        active = compiled_kernels()
        status = importlib.import_module("byrote.kernels.native").status()
    except ImportError as error:
        return Finding("FAIL", "kernels", f"byrote's own code does not import: {error}", "install byrote again; in a checkout: make setup")
    except ByroteError as error:  # a setting that every other command would refuse as well
        return Finding("FAIL", "kernels", str(error))
    on, off = (", ".join(name for name in active if active[name] is wanted) for wanted in (True, False))
    if not on:
        return Finding("note", "kernels", f"reference kernels only: {status['reason']}", "they give the same results, slower")
    built = f"{on} in C on {status['threads']} threads, by {status['compiler']}"
    return Finding("note", "kernels", f"{built}; by reference: {off}", str(status["reason"])) if off else Finding("ok", "kernels", built)


def compiled_kernels() -> dict[str, bool]:
    """Kernel → whether its C version serves here. Compiles what an earlier process has not."""
    kernels = importlib.import_module("byrote.kernels")
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg]
    paths = {name: f"byrote.kernels.{name}.cpu" for name in names}
    return {name: importlib.import_module(path).library() is not None for name, path in paths.items() if importlib.util.find_spec(path)}


def check_extras() -> Iterator[Finding]:
    for extra, (purpose, packages) in EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package.split(">=")[0].replace("-", "_")) is None]
        if missing:
            yield Finding("note", extra, f"not installed: {purpose}", install_advice(*missing))
        else:
            yield Finding("ok", extra, purpose)


def install_advice(*packages: str) -> str:
    quoted = " ".join(f"'{package}'" if ">" in package else package for package in packages)
    return f"{sys.executable} -m pip install {quoted}"
