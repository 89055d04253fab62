"""The accelerated producer of rows: cpu.cpp, built once by the machine's own compiler and called by address.

Optional: where there is no compiler, or where it fails, everything takes the plain road and that is said once.
Float32 on a CPU only. Knows nothing of what the rows mean; moments.py decides when to come here.
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

import numpy as np

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-w")
SWITCH = "INITLAB_ACCELERATED"  # 0 in the environment takes the plain road everywhere

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "describe_rows": [_POINTER, *[_SIZE] * 3, ctypes.c_int, *[_POINTER] * 2],
    "describe_job": [_POINTER] * 3,
    "foresee_job": [_POINTER] * 3,
    "entries_jobs": [_POINTER, _SIZE, *[_POINTER] * 2],
    "change_jobs": [_POINTER, _SIZE, *[_POINTER] * 2],
    "relu_job": [_POINTER] * 3,
    "mask_job": [_POINTER] * 3,
    "update_jobs": [_POINTER, _SIZE, _FLOAT, *[_POINTER] * 2],
}
JOB = ("x", "other", "unit_sums", "e", "n", "c", "first", "second", "third")  # columns of a job, int64 each


_plain = 0  # how many `plain()` are open


def library() -> ctypes.CDLL | None:
    """The compiled passes, or None on a machine that cannot build them; why not is logged, once."""
    return None if _plain else _found()


@contextmanager
def plain() -> Iterator[None]:
    """Inside, everything takes the plain road."""
    global _plain
    _plain += 1
    try:
        yield
    finally:
        _plain -= 1


@lru_cache
def _found() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return _loaded(_built())
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).warning("statistics in plain PyTorch, slower: %s", _reason(error))
        return None


def expanded(runs: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, int]:
    """Histograms that the compiled passes wrote, as counts (*starts.shape, 2, octaves), and the lowest octave.

    At a start stand the lowest octave, the number of octaves, then the counts of positive and of negative entries.
    """
    places = starts.reshape(-1)
    low, size = runs[places].astype(np.int64), runs[places + 1].astype(np.int64)
    lowest = int(low.min())
    counts = np.zeros((len(places), 2, int((low + size).max()) - lowest), dtype=np.int32)
    row = np.repeat(np.arange(len(places)), size)
    inside = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
    for sign in (0, 1):
        counts[row, sign, (low - lowest)[row] + inside] = runs[(places + 2 + sign * size)[row] + inside]
    return counts.reshape(*starts.shape, *counts.shape[1:]), lowest


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = next((line for line in error.stderr.splitlines() if "error" in line), f"exit status {error.returncode}")
        return f"{error.cmd[0]} cannot build them ({said.strip()}); set CXX to another C++ compiler"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _built() -> Path:
    """Path of the library, compiled if this source has not yet been for this compiler and processor."""
    given = os.environ.get("CXX", "").strip()
    compiler = given or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise OSError("no C++ compiler found (c++, g++, clang++ or $CXX)")
    words = [compiler] if Path(compiler).is_file() else shlex.split(compiler)
    if shutil.which(words[0]) is None:
        raise OSError(f"CXX={given}: no such program")
    built = _cache() / f"accelerated-{_fingerprint(compiler)}.so"
    proof = built.with_suffix(".blake2b")
    if not _is_whole(built, proof):
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            own = Path(folder) / built.name
            command = [*words, *FLAGS, "-o", str(own), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=300)
            own.with_suffix(".blake2b").write_text(_digest(own))
            own.replace(built)
            own.with_suffix(".blake2b").replace(proof)
    return built


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _is_whole(built: Path, proof: Path) -> bool:
    """Whether it is there, ours, and as it was built: loading half a library would end the process."""
    return all(path.is_file() and _is_ours(path) for path in (built, proof)) and proof.read_text() == _digest(built)


def _is_ours(path: Path) -> bool:
    """Whether nobody else could have put it there."""
    if not hasattr(os, "getuid"):
        return True
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _cache() -> Path:
    """A folder that only the user writes to, his cache or one for this process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "initlab"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and _is_ours(folder):
            return folder
    except (OSError, RuntimeError):
        pass  # no home, or one that cannot be written to
    return Path(tempfile.mkdtemp(prefix="initlab-"))


def _fingerprint(compiler: str) -> str:
    """Source, flags, compiler and what the processor can do: a home may be shared by several machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = [SOURCE.read_text(), *FLAGS, compiler, platform.machine(), platform.processor(), features]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _loaded(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found
