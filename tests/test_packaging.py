"""The wheel, built and installed into an environment of its own: what it holds, says of itself and does elsewhere."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import initlab
from initlab.stats.kernels.cpu import library

ROOT = Path(initlab.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the sources stand in the repository")
RELATIVE = re.compile(r"\]\((?!https?://)[^)]*\)")  # a link or a picture that leads nowhere from elsewhere


def call(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program that knows nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_the_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(found)
    assert str(found["version"]) == initlab.__version__ and found["license"] == "MIT"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    if done.returncode:
        pytest.skip(f"pip cannot build here: {done.stderr[-300:]}")
    (built,) = folder.glob("initlab-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel, which finds everything else where these tests do."""
    folder = tmp_path_factory.mktemp("environment")
    assert call(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    inside = folder / "bin/python"
    done = call(sys.executable, "-m", "pip", "--python", inside, "install", "-q", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    packages = call(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return inside


@pytest.mark.slow
def test_what_the_wheel_holds(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "initlab/py.typed" in names
    for folder in ("conf", "experiments"):
        own = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {f"initlab/{name}" for name in own} == {name for name in names if name.startswith(f"initlab/{folder}/")}
    assert {name.split("/")[0] for name in names} == {"initlab", f"initlab-{initlab.__version__}.dist-info"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or library() is None, reason="no compiler that builds for Linux")
def test_it_brings_the_compiled_passes(wheel: Path, python: Path, tmp_path: Path) -> None:
    """For a processor that can run them, on a machine that has no compiler: nothing is on the path there."""
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    able = "cpu._find_features() >= cpu.NEEDED"
    ask = f"from initlab.stats.kernels import cpu; print({able}, cpu.library() is not None)"
    done = call("/usr/bin/env", "-u", "CXX", "PATH=/", f"XDG_CACHE_HOME={tmp_path}", python, "-c", ask, cwd=tmp_path)
    assert done.returncode == 0 and len(set(done.stdout.split())) == 1, done.stdout + done.stderr


@pytest.mark.slow
def test_what_it_says_of_itself(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    about = message_from_string(archive.read(name).decode())
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(about.get_all("Classifier", []))
    assert all(" https://" in url for url in about.get_all("Project-URL", [])) and "Project-URL" in about
    text = str(about.get_payload())
    assert text.startswith("# initlab") and "python -m initlab" in text
    assert RELATIVE.findall(text) == []
    assert RELATIVE.findall((ROOT / "README.md").read_text(encoding="utf-8"))  # which leads inside the repository


@pytest.mark.slow
def test_it_runs_anywhere(python: Path, tmp_path: Path) -> None:
    """The console script, and a study by its name alone; neither finds anything of this checkout."""
    script = python.with_name("initlab")
    done = call(script, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"initlab {initlab.__version__}\n"), done.stderr
    small = ("init=kaiming", "depth=3", "width=8", "seeds=1", "train.steps=2")
    done = call(script, "-cn", "rules", *small, cwd=tmp_path)
    assert "Traceback" not in done.stderr and "Which of the chapter's scalings" in done.stdout, done.stderr
    assert list(tmp_path.glob("outputs/rules/*/0/stats.parquet"))
    where = call(python, "-c", "import initlab; print(initlab.__file__)", cwd=tmp_path).stdout
    assert str(python.parents[1]) in where
    done = call(script, "gallery", cwd=tmp_path)
    assert done.returncode == 2 and "name the folder of yours with --experiments" in done.stderr


@pytest.mark.slow
def test_a_users_file_is_checked_by_mypy(python: Path, tmp_path: Path) -> None:
    """What is right passes with the strictest settings, what is wrong is found: types are there."""
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(
        "import initlab\n\nvalue: float = initlab.gain('relu')\nrule = initlab.Rule(gain=2.0)\n"
        "frame = initlab.stack(rule, depth=2, width=4, seeds=1)\n",
        encoding="utf-8",
    )
    wrong.write_text("import initlab\n\nvalue: str = initlab.gain('relu')\n", encoding="utf-8")
    check = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python)
    passed = call(*check, right, cwd=tmp_path)
    assert passed.returncode == 0, passed.stdout
    failed = call(*check, wrong, cwd=tmp_path)
    assert failed.returncode == 1 and "Incompatible types in assignment" in failed.stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pyroma") is None, reason="needs pyroma")
def test_pyroma_has_nothing_to_say() -> None:
    """But for an address of the authors, which they have not given."""
    done = call(sys.executable, "-m", "pyroma", "--min", "10", "--skip-tests", "AuthorEmail", ROOT)
    assert done.returncode == 0, done.stdout
