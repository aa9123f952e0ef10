#!/bin/sh
# Makes the virtual environment and installs byrote into it. `make` calls this; without make: sh scripts/setup.sh
#
# This part finds a Python that works, and says what to install when there is none; scripts/install.py does the rest.
# Running it again costs milliseconds: a stamp, written last, records which files the environment was made from, so that an
# interrupted or outdated set-up is noticed and repaired. Needs a POSIX shell and Python, no compiler.
#
#   PYTHON=/path/to/python3.12   use this interpreter
#   VENV=folder                  where the environment goes (default .venv)
#   TORCH=auto|cpu|cuda          which build of PyTorch (default auto: cpu unless an NVIDIA driver is present)
#   TORCH_INDEX_URL=address      package index to take PyTorch from (pytorch.org shows them under "Get Started")
set -eu
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
TORCH=${TORCH:-auto}
PYTHON=${PYTHON:-}
OS_RELEASE=${OS_RELEASE:-/etc/os-release}
export VENV TORCH PYTHON

say() { printf '%s\n' "$*" >&2; }
stop() { say "setup: $*"; exit 1; }

# What the environment is made from. The place counts: in a moved environment the scripts point to where it was.
fingerprint() { { pwd -P; cat pyproject.toml constraints.txt scripts/setup.sh scripts/install.py; } | cksum; }

is_current() {
    [ -f "$VENV/.setup-done" ] && [ -x "$VENV/bin/python" ] || return 1
    { read -r made_from; read -r build; read -r interpreter; } < "$VENV/.setup-done" || return 1
    [ "$made_from" = "$(fingerprint)" ] || return 1
    [ "$TORCH" = auto ] || [ "$TORCH" = "$build" ] || return 1
    [ -z "$PYTHON" ] || [ "$PYTHON" = "$interpreter" ]
}

# Runs the interpreter instead of trusting its name: a version manager's shim may stand for a version that is not selected.
verdict() {
    "$1" -c '
import struct, sys
version, bits = "%d.%d" % sys.version_info[:2], 8 * struct.calcsize("P")
if not (3, 11) <= sys.version_info[:2] <= (3, 14) or bits < 64:
    print("%s, %d bit" % (version, bits))
else:
    try:
        import ensurepip, venv
        print("works")
    except ImportError:
        print("no-venv " + version)
' 2>/dev/null || echo "does not run"
}

# Sets `chosen`, or explains and ends. Newest is not best: python3 is what the system looks after.
choose_python() {
    seen=""
    no_venv=""
    if [ -n "$PYTHON" ]; then set -- "$PYTHON"; else set -- python3 python3.12 python3.13 python3.11 python3.14; fi
    for name in "$@"; do
        [ -n "$PYTHON" ] || command -v "$name" >/dev/null 2>&1 || continue
        found=$(verdict "$name")
        [ "$found" != works ] || { chosen=$name; return; }
        seen="$seen$name ($found); "
        case $found in no-venv*) no_venv=${no_venv:-${found#no-venv }} ;; esac
    done
    say "setup: byrote needs a 64-bit Python 3.11 to 3.14 with its venv module. Seen: ${seen:-none}"
    install_lines "$no_venv"
    exit 1
}

system() {
    case "$(uname -s)" in
        Darwin) echo macos; return ;;
        MINGW* | MSYS* | CYGWIN*) echo windows; return ;;
    esac
    [ -r "$OS_RELEASE" ] || { echo other; return; }
    (
        . "$OS_RELEASE"
        case " ${ID:-} ${ID_LIKE:-} " in
            *" debian "* | *" ubuntu "*) echo "debian $ID ${VERSION_ID:-}" ;;
            *" rhel "*) echo rhel ;;
            *" fedora "*) echo fedora ;;
            *) echo other ;;
        esac
    )
}

# install_lines X.Y: what to type on this system; X.Y is a Python that lacks only its venv module, or nothing.
install_lines() {
    say "Install what is missing, then run the same command again:"
    case "$(system) :$1" in
        debian*:3*) say "    sudo apt-get update && sudo apt-get install -y make python$1-venv" ;;
        "debian ubuntu 22."*) say "    sudo apt-get update && sudo apt-get install -y make python3.11 python3.11-venv" ;;
        "debian ubuntu 20."* | "debian ubuntu 18."* | "debian debian 11"* | "debian debian 10"*)
            say "    (this release offers no Python 3.11: upgrade the system, or install one with pyenv, uv or conda)" ;;
        debian*) say "    sudo apt-get update && sudo apt-get install -y make python3 python3-venv" ;;
        fedora*) say "    sudo dnf install -y make python3" ;;
        rhel*) say "    sudo dnf install -y make python3.12" ;;
        macos*) say "    xcode-select --install ; brew install python@3.12" ;;
        windows*)
            say "    wsl --install        (in PowerShell; byrote runs inside the Ubuntu that this installs; there:)"
            say "    sudo apt-get update && sudo apt-get install -y make python3 python3-venv" ;;
        *) say "    make, python3 (3.11 to 3.14) and, where it is a package of its own, its venv module, by your package manager" ;;
    esac
    say "PYTHON=/path/to/python3.12 chooses an interpreter by hand."
}

warn_if_slow() {
    case "$(pwd -P)" in
        /mnt/[a-z]/*) grep -qi microsoft /proc/version 2>/dev/null || return 0 ;;
        *) return 0 ;;
    esac
    say "setup: warning: this folder lies on the Windows drive, which WSL reaches about ten times slower than its own disk."
    say "       Set-up and training are much faster from a copy: cp -r . ~/byrote && cd ~/byrote"
}

is_ours() { [ -f "$VENV/pyvenv.cfg" ] || [ -f "$VENV/.setup-begun" ] || [ -z "$(ls -A "$VENV" 2>/dev/null)" ]; }

case "$TORCH" in auto | cpu | cuda) ;; *) stop "TORCH is '$TORCH'; allowed: auto, cpu, cuda" ;; esac
! is_current || exit 0
is_ours || stop "$VENV exists and is no virtual environment; move it away, or choose another place with VENV=folder"
choose_python
warn_if_slow
command -v make >/dev/null 2>&1 || say "setup: make is missing; without it use $VENV/bin/byrote quickstart and $VENV/bin/python -m pytest"
made_from=$(fingerprint)
rm -f "$VENV/.setup-done"
exec "$chosen" scripts/install.py "$made_from"
