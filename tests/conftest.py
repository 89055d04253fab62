"""Shared by all tests: one thread, and the command line in this process."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from initlab.__main__ import BLAS, main

for name in BLAS:  # before numpy is imported, as the command line does it
    os.environ.setdefault(name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hydra._internal.hydra import Hydra  # noqa: E402
from hydra.types import RunMode  # noqa: E402

from initlab import stops  # noqa: E402
from initlab.nn.activations import ACTIVATIONS  # noqa: E402

# Options of a job that takes a moment, in the sizes of its networks and without what it draws.
TINY = ("depth=3", "width=8", "batch=16", "train.width=4", "train.steps=3", "train.batch=8")
TINY += ("plots=false", "report=false")

# Names of the activations, one for each row of their table: swish is another name of silu's.
ROWS = [name for name in ACTIVATIONS if name != "swish"]


def pytest_configure() -> None:
    """A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What collecting makes stays to the end: looking through it for garbage took a third of collecting's time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none here"))


@pytest.fixture(autouse=True, scope="session")
def hydra_composes_once() -> Iterator[None]:
    """Hydra composes a job twice, first to learn whether it is a sweep: our own configuration says nothing of it."""
    find_mode = Hydra.get_mode

    def get_mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
        known = config_name == "config" and not any("hydra.mode" in word or "-c" in word for word in sys.argv)
        return None if known else find_mode(hydra, config_name, overrides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", get_mode)
        yield


@pytest.fixture(autouse=True)
def one_thread_and_one_seed() -> Iterator[None]:
    """Small matrices on busy cores run many times slower with two threads than with one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # a test that fails once in a thousand runs says nothing when it does
    yield


@pytest.fixture
def lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`lab("init=naive", "depth=3")` runs the command line in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["initlab", *words])
        handlers = {number: signal.getsignal(number) for number in stops.NUMBERS}
        try:
            code = main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
