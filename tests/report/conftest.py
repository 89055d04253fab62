"""The runs whose pages are looked at."""

from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from tests.report.pages import COMMANDS, make_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Looked at by all workers. Each makes what no other is making; then it waits for what others make."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "pages"
    folder.mkdir(exist_ok=True)
    for timeout in (0, -1):
        for name in COMMANDS:
            with suppress(Timeout), FileLock(f"{folder}/{name}.lock", timeout):
                if not (folder / f"{name}.made").exists():
                    make_run(folder, name)
                    (folder / f"{name}.made").touch()
    return folder
