"""Fills the virtual environment: PyTorch first, then byrote and its tools. Called by setup.sh; needs the standard library alone.

Which build of PyTorch? On Linux the default package index carries one with CUDA (it runs without a GPU too, but brings
gigabytes of libraries); the small CPU build comes from an index that PyTorch keeps, or from a folder of wheels. Whatever
pip is set to use (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf) is respected. So the script asks pip what it would take, says
in plain words what that means, and refuses only what is the opposite of an explicit TORCH=cpu or TORCH=cuda.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

VENV = Path(os.environ.get("VENV", ".venv"))
BEGUN, DONE = VENV / ".setup-begun", VENV / ".setup-done"
DISK_GIB = {"cpu": 2, "cuda": 9}  # what the finished environment takes, rounded up
DOWNLOAD = {"cpu": "about 200 MB", "cuda": "about 2.5 to 3 GB with its CUDA libraries"}
INDEX_HELP = """\
       For the {build} build: pytorch.org, "Get Started", choose your system, Pip and {choice}. The command it shows ends in
       --index-url ADDRESS. Then run:  make setup TORCH={torch} TORCH_INDEX_URL=ADDRESS
       (A folder with the wheel works as well: PIP_FIND_LINKS=folder.)"""


def main(made_from: str) -> None:
    begun = time.monotonic()
    make_environment()
    build = install_torch()
    say("[3/3] installing byrote and its tools: about 85 small packages, 120 MB to download unless pip has them already")
    pip_install(pinned("setuptools"))
    pip_install("--no-build-isolation", "--editable", ".[dev]")
    verify()
    finish(made_from, build)
    say(f"ready after {time.monotonic() - begun:.0f} s; next: make quickstart, or make test")


def say(line: str) -> None:
    print(f"setup: {line}", file=sys.stderr, flush=True)


def stop(line: str) -> NoReturn:
    say(line)
    raise SystemExit(1)


def make_environment() -> None:
    """Keep an environment that works, with whatever an interrupted set-up got done; make a new one in place of any other."""
    if environment_works():
        say(f"[1/3] keeping {VENV}")
        BEGUN.touch()
        drop_half_installed()
        return
    say(f"[1/3] making {VENV} with Python {platform.python_version()} ({sys.executable})")
    VENV.mkdir(parents=True, exist_ok=True)
    BEGUN.touch()  # before anything else: from here on the folder is known to be ours, however far this gets
    for child in VENV.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child != BEGUN:
            child.unlink()
    if subprocess.run([sys.executable, "-m", "venv", str(VENV)]).returncode != 0:
        stop(f"could not make {VENV}; the lines above say why. PYTHON=/path/to/python3.12 chooses another interpreter")


def environment_works() -> bool:
    """It runs, has pip, lies where it was made, and has the interpreter asked for, if one was."""
    settings = VENV / "pyvenv.cfg"
    if not (VENV / "bin" / "pip").exists() or not settings.exists() or f"-m venv {os.path.abspath(VENV)}\n" not in settings.read_text():
        return False
    probe = subprocess.run([python(), "-c", "import pip, sys; print(sys.version)"], capture_output=True, text=True)
    return probe.returncode == 0 and (not os.environ.get("PYTHON") or probe.stdout.strip() == sys.version)


def drop_half_installed() -> None:
    """pip ends a package by rewriting RECORD to name INSTALLER too; without that it was cut short, and pip must not trust it."""
    for info in VENV.glob("lib/python*/site-packages/*.dist-info"):
        record = info / "RECORD"
        if not record.exists() or f"{info.name}/INSTALLER," not in record.read_text(encoding="utf-8"):
            shutil.rmtree(info)


def python() -> str:
    return str(VENV / "bin" / "python")


def pip(*arguments: str) -> int:
    return subprocess.run([python(), "-m", "pip", "--disable-pip-version-check", *arguments]).returncode


def pip_install(*what: str) -> None:
    if pip("install", "--constraint", "constraints.txt", *what) != 0:
        stop(
            f"pip could not install {' '.join(what)}; its message is above. Running the same command again goes on from here.\n"
            "       No matching distribution: this Python may have no build of a package yet; try PYTHON=python3.12."
        )


def pinned(name: str) -> str:
    """The line of constraints.txt that pins `name`."""
    lines = Path("constraints.txt").read_text().splitlines()
    return next(line.strip() for line in lines if line.startswith(f"{name}=="))


def install_torch() -> str:
    """Install the pinned PyTorch, or keep it; returns "cpu" or "cuda"."""
    asked = os.environ.get("TORCH", "auto")
    present = installed_torch()
    if present and asked in ("auto", present):
        say(f"[2/3] keeping {pinned('torch')} ({present} build)")
        return present
    build, source = offered_torch()
    check_choice(asked, build)
    check_disk(build)
    say(f"[2/3] installing {pinned('torch')}, {build} build, {source}")
    pip_install("--no-deps", "--force-reinstall", *torch_index(), pinned("torch"))
    return build


def installed_torch() -> str | None:
    """Build of the PyTorch in the environment, or None where it is missing or not the pinned version."""
    code = "import json; from importlib.metadata import metadata; print(json.dumps(metadata('torch').json))"
    probe = subprocess.run([python(), "-c", code], capture_output=True, text=True)
    if probe.returncode != 0:
        return None
    facts = json.loads(probe.stdout)
    return build_of(facts) if facts["version"].split("+")[0] == pinned("torch").split("==")[1] else None


def offered_torch() -> tuple[str, str]:
    """(build, where it comes from) of the PyTorch that pip would take now."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ("--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", str(report), *torch_index())
        if pip("install", *options, pinned("torch")) != 0:
            stop(
                f"pip finds no {pinned('torch')} for Python {platform.python_version()} on {platform.platform()}; its message is above.\n"
                "       Without a network, PIP_FIND_LINKS=folder names a folder of wheels; PYTHON=python3.12 chooses another Python."
            )
        chosen = json.loads(report.read_text())["install"][0]
    build = build_of(chosen["metadata"])
    on_disk = chosen["download_info"]["url"].startswith("file:")
    return build, "from a wheel on this disk" if on_disk else f"download: {DOWNLOAD[build]}"


def torch_index() -> list[str]:
    """PyTorch may come from an index of its own; all other packages come from where pip is set to look."""
    address = os.environ.get("TORCH_INDEX_URL")
    return ["--index-url", address] if address else []


def build_of(metadata: dict) -> str:
    """ "cpu" or "cuda" (here: any GPU build), from a package's name tag, or from the libraries it asks for."""
    _, _, tag = metadata["version"].partition("+")
    if tag or sys.platform != "linux":
        return "cuda" if tag and tag != "cpu" else "cpu"
    needs = [need for need in metadata.get("requires_dist", []) if need.startswith(("nvidia-", "cuda-", "triton"))]
    here = [need for need in needs if "extra ==" not in need and ("x86_64" not in need or platform.machine() == "x86_64")]
    return "cuda" if here else "cpu"


def has_nvidia_driver() -> bool:
    places = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")
    return any(Path(place).exists() for place in places) or shutil.which("nvidia-smi") is not None


def check_choice(asked: str, build: str) -> None:
    """Refuse the opposite of what was asked for; where nothing was, say what could be had instead and go on."""
    to_cpu = INDEX_HELP.format(build="small CPU", choice="CPU", torch="cpu")
    to_cuda = INDEX_HELP.format(build="CUDA", choice="a CUDA version", torch="cuda")
    if asked == "cuda" and sys.platform == "darwin":
        stop("TORCH=cuda: there is no CUDA on macOS; TORCH=auto installs the build that uses Apple GPUs (--device mps)")
    if asked not in ("auto", build):
        stop(f"TORCH={asked}, but pip would take the {build} build from where it looks now.\n" + (to_cpu if asked == "cpu" else to_cuda))
    if asked == "auto" and build == "cuda" and not has_nvidia_driver():
        say(
            "no NVIDIA driver seen, yet pip offers the CUDA build only. It runs on the CPU too; to save the download, press Ctrl-C.\n"
            + to_cpu
        )
    if asked == "auto" and build == "cpu" and has_nvidia_driver():
        say("an NVIDIA driver is present, but pip offers the CPU build where it looks now; byrote will not see the GPU.\n" + to_cuda)


def check_disk(build: str) -> None:
    free_gib = shutil.disk_usage(VENV).free / 1024**3
    if free_gib < DISK_GIB[build]:
        stop(
            f"{VENV} will take up to {DISK_GIB[build]} GiB and {free_gib:.1f} GiB are free; free some space or choose VENV=folder elsewhere"
        )


def verify() -> None:
    if subprocess.run([python(), "-c", "import numpy, safetensors, tokenizers, torch, byrote"]).returncode != 0:
        stop(f"a package does not import; the error is above. If running this again does not help: rm -r {VENV} && make setup")


def finish(made_from: str, build: str) -> None:
    """Write the stamp beside and rename it: it exists only when everything before it is done."""
    beside = DONE.with_suffix(".new")
    beside.write_text(f"{made_from}\n{build}\n{os.environ.get('PYTHON', '')}\n")
    beside.replace(DONE)
    BEGUN.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
