"""The runs whose pages are looked at."""

from pathlib import Path

import pytest

from tests.report.pages import make_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("pages"))
