"""The C++ passes over tensors on a CPU: built once by the machine's own compiler, then loaded and called by address.

They are optional. Where there is no compiler, or where it fails, those that a wheel for Linux brings serve a processor
with AVX2; else plain PyTorch makes the same rows, and a warning says so once.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-w")
PORTABLE = SOURCE.with_name("portable.so")  # of a wheel
PROCESSOR, NEEDED = (
    "x86-64-v3",
    {"avx2", "bmi2", "f16c", "fma", "movbe", "abm"},
)  # that it is for, as /proc/cpuinfo says it
PATIENCE = 60  # seconds that a compiler may take; it takes 4 where nothing else runs
SWITCH = "INITLAB_ACCELERATED"  # 0 in the environment asks for plain PyTorch everywhere

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS = {
    "describe_rows": [_POINTER, *[_SIZE] * 3, ctypes.c_int, *[_POINTER] * 2],
    "describe_many": [*[_POINTER] * 4, ctypes.c_int, _SIZE, *[_POINTER] * 2],
    "share_inside": [_POINTER, *[_SIZE] * 2, _POINTER, _SIZE, _POINTER],
    "units_last": [_POINTER, *[_SIZE] * 3, _POINTER],
    "compare_many": [*[_POINTER] * 4, _SIZE, _POINTER],
    "relu_rows": [*[_POINTER] * 2, *[_SIZE] * 3, *[_POINTER] * 2],
    "mask_rows": [*[_POINTER] * 3, *[_SIZE] * 3, *[_POINTER] * 3],
    "linear_rows": [*[_POINTER] * 2, *[_SIZE] * 3, ctypes.c_double, _POINTER],
    "derive_rows": [_POINTER, *[_SIZE] * 3, _POINTER],
    "all_inside": [_POINTER, _SIZE, ctypes.c_double],
    "draw_numbers": [_POINTER, *[_SIZE] * 2, ctypes.c_int, _POINTER],
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
        return _set_types(_load())
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        if PORTABLE.is_file() and _find_features() >= NEEDED:
            with suppress(OSError, AttributeError):
                return _set_types(ctypes.CDLL(str(PORTABLE)))
        logging.getLogger(__name__).warning("statistics in plain PyTorch, slower: %s", _reason(error))
        return None


def _set_types(found: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, ctypes.c_int if name == "all_inside" else None
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        text = next((line for line in error.stderr.splitlines() if "error" in line), f"exit status {error.returncode}")
        return f"{error.cmd[0]} cannot build them ({text.strip()}); set CXX to another C++ compiler"
    return (str(error).splitlines() or [type(error).__name__])[0]


def build_portable(target: Path) -> None:
    """Compile the passes for every processor of a kind, not for this one alone. Errors: no compiler, or it fails."""
    _compile(_find_compiler()[0], target, [flag.replace("native", PROCESSOR) for flag in FLAGS])


def _find_compiler() -> tuple[list[str], str]:
    """The command of the compiler, and the text by which it is known."""
    given = os.environ.get("CXX", "").strip()
    compiler = given or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise OSError("no C++ compiler found (c++, g++, clang++ or $CXX)")
    command = [compiler] if Path(compiler).is_file() else shlex.split(compiler)
    if shutil.which(command[0]) is None:
        raise OSError(f"CXX={given}: no such program")
    return command, compiler


def _load() -> ctypes.CDLL:
    """The library; it is compiled unless it was before, from these sources for this compiler and processor.

    One process compiles, and others that need the same wait for it. Without a folder to keep it in the library is
    removed as soon as it is loaded.
    """
    command, compiler = _find_compiler()
    name = f"accelerated-{_fingerprint(compiler)}.so"
    folder = _cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="initlab-", ignore_cleanup_errors=True) as own:
            return ctypes.CDLL(str(_compile(command, Path(own) / name)))
    built = folder / name
    if not _is_whole(built):
        from filelock import FileLock

        with FileLock(built.with_suffix(".lock"), timeout=2 * PATIENCE, mode=0o600):
            if not _is_whole(built):
                _build(command, built)
    return ctypes.CDLL(str(built))


def _build(command: Sequence[str], built: Path) -> None:
    """Compile into the cache, where nobody else compiles meanwhile; a compiler that hung once is not asked again."""
    hung, folder = built.with_suffix(".hung"), built.with_suffix(".build")
    if hung.exists():
        raise OSError(f"{command[0]} hung the last time; remove {hung} to try it again")
    shutil.rmtree(folder, ignore_errors=True)  # what a process that was killed has left
    folder.mkdir(mode=0o700)
    try:
        own = _compile(command, folder / built.name)
        own.replace(built)
        _digest_path(own).replace(_digest_path(built))
    except subprocess.TimeoutExpired:
        hung.touch()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile(command: Sequence[str], target: Path, flags: Sequence[str] | None = None) -> Path:
    """The library with its proof beside it, which only the user can write to, whatever the umask."""
    complete = [*command, *(flags or FLAGS), "-o", str(target), str(SOURCE)]
    pipe = subprocess.PIPE
    compiler = subprocess.Popen(
        complete, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = compiler.communicate(timeout=PATIENCE)
    except BaseException:  # with the processes that it started, which would hold the pipes open
        with suppress(OSError):
            os.killpg(compiler.pid, signal.SIGKILL) if hasattr(os, "killpg") else compiler.kill()
        compiler.communicate()
        raise
    if compiler.returncode:
        raise subprocess.CalledProcessError(compiler.returncode, complete, out, err)
    _digest_path(target).write_bytes(_digest(target))
    for path in (target, _digest_path(target)):
        path.chmod(0o700)
    return target


def _digest_path(built: Path) -> Path:
    """The file that holds the digest of a library."""
    return built.with_suffix(".blake2b")


def _digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest().encode()


def _is_whole(built: Path) -> bool:
    """Whether the library is there, the user's own, and complete: loading half a library would end the process."""
    both = (built, _digest_path(built))
    return all(path.is_file() and _is_private(path) for path in both) and _digest_path(built).read_bytes() == _digest(
        built
    )


def _is_private(path: Path) -> bool:
    """Whether only this user can have written the file or folder."""
    if not hasattr(os, "getuid"):
        return True
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _cache_folder() -> Path | None:
    """A folder that only the user can write to: in the user's cache, else in the system's folder for temporary files.

    None where neither is to be had.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111 - raises nothing
    for folder in (cache / "initlab", Path(tempfile.gettempdir()) / f"initlab-{user}"):
        try:
            if folder.is_absolute():  # else there is no home
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if os.access(folder, os.W_OK) and _is_private(folder) and not folder.is_symlink():
                    return folder
        except OSError:
            continue
    return None


def _find_features() -> set[str]:
    """The words for what the processor can do, where Linux lists them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def _fingerprint(compiler: str) -> str:
    """A text that differs with sources, flags, compiler and processor: several machines may share one home."""
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = [*sources, *FLAGS, compiler, platform.machine(), platform.processor(), *sorted(_find_features())]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
