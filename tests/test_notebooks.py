"""The notebooks run from the first cell to the last, show pictures, and stand in the repository without outputs."""

from pathlib import Path

import pytest

import initlab

ROOT = Path(initlab.__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
pytestmark = pytest.mark.skipif(not NOTEBOOKS.is_dir(), reason="the notebooks stand in the repository")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

# What each must answer, in its own words: reader -> text that its cells print.
ANSWERS = {
    "student": [
        "naive    45",
        "small    40",
        "self.inp.g = self.out.g @ self.w.t()",
        "equal",
        "a sum over the batch of 64",
    ],
    "researcher": ["bump  chi 0.7961   rms 0.8138", "of 510 layers of networks lie in the band of 95 %"],
    "engineer": ["vanishing at layer 1", "initlab.init_(model, 'kaiming')", "healthy: nothing found"],
}


def read(reader: str):
    return nbformat.read(NOTEBOOKS / f"{reader}.ipynb", as_version=4)


def test_there_is_one_for_each_reader_and_none_has_outputs() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(ANSWERS)
    for reader in ANSWERS:
        book = read(reader)
        nbformat.validate(book)
        assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith(f"# For the {reader}: ")
        assert all(
            cell.outputs == [] and cell.execution_count is None for cell in book.cells if cell.cell_type == "code"
        )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of the libraries that talk to the kernel
@pytest.mark.parametrize("reader", ANSWERS)
def test_it_runs_and_answers(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, with this tree's initlab. Every figure is a picture in the page, not a line of text."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = read(reader)
    nbclient.NotebookClient(book, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in book.cells if cell.cell_type == "code" for out in cell.outputs]
    printed = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")
    values = [out.data for out in outputs if "data" in out]
    printed += "\n".join(value["text/plain"] for value in values)
    assert [text for text in ANSWERS[reader] if text not in printed] == []
    assert sum("image/png" in value for value in values) >= 2
    assert [out.text for out in outputs if out.output_type == "stream" and out.name == "stderr"] == []
    losses = [line.split(" -> ") for line in printed.splitlines() if line.startswith("loss ") and " -> " in line]
    if reader == "engineer":  # ln 10 before, less than half of it after
        assert float(losses[0][1].split(";")[0]) > 2.25 and float(losses[1][1]) < 1.15
