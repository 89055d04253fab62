"""The C++ passes over tensors on a CPU: built once by the machine's own compiler, then loaded and called by address.

They are optional: where there is no compiler, or where it fails, plain PyTorch makes the same rows, and a warning says
so once.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-w")
SWITCH = "INITLAB_ACCELERATED"  # 0 in the environment asks for plain PyTorch everywhere

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "describe_rows": [_POINTER, *[_SIZE] * 3, ctypes.c_int, *[_POINTER] * 2],
    "describe_many": [*[_POINTER] * 3, _SIZE, *[_POINTER] * 2],
    "relu_rows": [_POINTER, *[_SIZE] * 3, *[_POINTER] * 2],
    "mask_rows": [*[_POINTER] * 2, *[_SIZE] * 3, *[_POINTER] * 3],
    "update_rows": [*[_POINTER] * 2, *[_SIZE] * 2, _FLOAT, *[_POINTER] * 2],
}

_plain = 0  # how many `plain()` are open


def library() -> ctypes.CDLL | None:
    """The compiled passes, or None on a machine that cannot build them; the reason is logged once."""
    return None if _plain else _library()


@contextmanager
def plain() -> Iterator[None]:
    """Inside, plain PyTorch makes all rows."""
    global _plain
    _plain += 1
    try:
        yield
    finally:
        _plain -= 1


@lru_cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        found = ctypes.CDLL(str(_build()))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, None
        return found
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).warning("statistics in plain PyTorch, slower: %s", _reason(error))
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        text = next((line for line in error.stderr.splitlines() if "error" in line), f"exit status {error.returncode}")
        return f"{error.cmd[0]} cannot build them ({text.strip()}); set CXX to another C++ compiler"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _build() -> Path:
    """Path of the library; it is compiled unless it was before, from these sources for this compiler and processor."""
    given = os.environ.get("CXX", "").strip()
    compiler = given or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise OSError("no C++ compiler found (c++, g++, clang++ or $CXX)")
    command = [compiler] if Path(compiler).is_file() else shlex.split(compiler)
    if shutil.which(command[0]) is None:
        raise OSError(f"CXX={given}: no such program")
    built = _cache_folder() / f"accelerated-{_fingerprint(compiler)}.so"
    proof = built.with_suffix(".blake2b")
    if not _is_whole(built, proof):
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            own = Path(folder) / built.name
            complete = [*command, *FLAGS, "-o", str(own), str(SOURCE)]
            subprocess.run(complete, check=True, capture_output=True, text=True, errors="replace", timeout=300)
            own.with_suffix(".blake2b").write_text(_digest(own))
            own.replace(built)
            own.with_suffix(".blake2b").replace(proof)
    return built


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _is_whole(built: Path, proof: Path) -> bool:
    """Whether the library is there, the user's own, and complete: loading half a library would end the process."""
    return all(path.is_file() and _is_private(path) for path in (built, proof)) and proof.read_text() == _digest(built)


def _is_private(path: Path) -> bool:
    """Whether only this user can have written the file or folder."""
    if not hasattr(os, "getuid"):
        return True
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _cache_folder() -> Path:
    """A folder that only the user can write to: in the user's cache, or a temporary one for this process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "initlab"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and _is_private(folder):
            return folder
    except (OSError, RuntimeError):
        pass  # no home, or one that cannot be written to
    return Path(tempfile.mkdtemp(prefix="initlab-"))


def _fingerprint(compiler: str) -> str:
    """A text that differs with sources, flags, compiler and processor: several machines may share one home."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = [*sources, *FLAGS, compiler, platform.machine(), platform.processor(), features]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
