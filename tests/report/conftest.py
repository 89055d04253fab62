"""The runs whose pages are looked at."""

from pathlib import Path

import pytest
from filelock import FileLock

from tests.report.pages import make_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Made by the worker that needs them first, and looked at by all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "pages"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make_runs(folder)
            (folder / "made").touch()
    return folder
