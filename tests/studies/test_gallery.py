"""experiments/README.md lists every study, and is written from what the sweeps left."""

import html
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

import initlab
from initlab import commands
from initlab.errors import UsageError
from initlab.studies.gallery import BEGIN, END, copy_small

ROOT = Path(initlab.__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"


@pytest.mark.skipif(not EXPERIMENTS.is_dir(), reason="the studies stand in the repository")
def test_the_index_knows_every_study() -> None:
    text = html.unescape((EXPERIMENTS / "README.md").read_text(encoding="utf-8"))
    assert text.count(BEGIN) == text.count(END) == 1
    rows = [line for line in text.splitlines() if line.startswith("| [`")]
    for path in EXPERIMENTS.glob("*.yaml"):
        about = yaml.safe_load(path.read_text(encoding="utf-8"))["study"]
        (row,) = [row for row in rows if row.startswith(f"| [`{path.stem}`]")]
        cost = about["cost"]
        assert f"| {about['question']} | {cost['runs']} | {cost['cpu_seconds']:g} |" in row
        assert f"### `{path.stem}`" in text and " ".join(about["source"].split()) in text
    assert len(rows) == len(list(EXPERIMENTS.glob("*.yaml")))


def left(folder: Path, study: str, holds: int, overrides: tuple[str, ...] = (), status: str = "done") -> None:
    """What a sweep of one job leaves."""
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "run.json").write_text(json.dumps({"status": status}))
    verdicts = [{"said": f"{'holds' if k < holds else 'FAILS'}: sentence {k} (measured {k})"} for k in range(2)]
    kept = {"study": study, "overrides": overrides, "holds": holds, "of": 2, "verdicts": verdicts}
    (folder / "expect.json").write_text(json.dumps(kept))
    Image.effect_noise((300, 200), 50).save(folder / f"{study}.png")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder of two studies and a README with its marks."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name, question in (("one", "Is it one?"), ("two", "Is it two?")):
        cost = "{runs: 3, cpu_seconds: 1.5, gpu_seconds: null}"
        (folder / f"{name}.yaml").write_text(f"study: {{question: '{question}', source: a book, cost: {cost}}}\n")
    (folder / "README.md").write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    return folder


def main(words: list[str]) -> int:
    return commands.run(["gallery", *words])


def test_the_newest_whole_sweep_is_shown(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = tmp_path / "outputs" / "one"
    left(outputs / "2026-01-01_00-00-00.000000", "one", 0)
    left(outputs / "2026-01-02_00-00-00.000000", "one", 2)
    left(outputs / "2026-01-03_00-00-00.000000", "one", 1, overrides=("depth=3",))  # not the study's own size
    left(outputs / "2026-01-04_00-00-00.000000", "one", 1, status="interrupted")  # not the whole of it
    assert main(["--experiments", str(house), str(tmp_path / "outputs")]) == 0
    assert "2 studies, 1 of them with a new sweep" in capsys.readouterr().out
    text = (house / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| [`one`](#one) | Is it one? | 3 | 1.5 |  | 2 of 2 hold |" in text
    assert "| [`two`](#two) | Is it two? | 3 | 1.5 |  | not run yet |" in text
    assert "- holds: sentence 1 (measured 1)" in text and "FAILS" not in text
    assert "![Is it one?](one.png)" in text and "(two.png)" not in text
    own = outputs / "2026-01-02_00-00-00.000000" / "one.png"
    assert 0 < (house / "one.png").stat().st_size < own.stat().st_size
    with Image.open(house / "one.png") as image:
        assert image.size == (300, 200)


def test_what_is_known_stays_where_there_is_no_new_sweep(house: Path, tmp_path: Path) -> None:
    left(tmp_path / "outputs" / "one" / "2026-01-01_00-00-00.000000", "one", 1)
    left(tmp_path / "outputs" / "two" / "2026-01-01_00-00-00.000000", "two", 2)
    assert main(["--experiments", str(house), str(tmp_path / "outputs")]) == 0
    first = (house / "README.md").read_text()
    assert "1 of 2 hold" in first and "2 of 2 hold" in first and "- FAILS: sentence 1" in first
    with pytest.raises(UsageError, match="elsewhere: no such folder"):
        main(["--experiments", str(house), str(tmp_path / "elsewhere")])
    (tmp_path / "elsewhere").mkdir()
    assert main(["--experiments", str(house), str(tmp_path / "elsewhere")]) == 0
    assert (house / "README.md").read_text() == first
    left(tmp_path / "outputs" / "two" / "2026-01-02_00-00-00.000000", "two", 0)
    assert main(["--experiments", str(house), str(tmp_path / "outputs" / "two")]) == 0
    assert (house / "README.md").read_text() == first.replace("2 of 2 hold", "0 of 2 hold").replace(
        "**0 of 2 hold**\n\n- holds: sentence 0 (measured 0)\n- holds: sentence 1 (measured 1)",
        "**0 of 2 hold**\n\n- FAILS: sentence 0 (measured 0)\n- FAILS: sentence 1 (measured 1)",
    )


def test_what_comes_from_elsewhere_is_shown_as_text(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tags and links of an answer are escaped; a file that cannot be read is named, and the others count."""
    left(tmp_path / "outputs" / "a", "one", 2)
    left(tmp_path / "outputs" / "b", "two", 2)
    answers = tmp_path / "outputs" / "a" / "expect.json"
    kept = json.loads(answers.read_text())
    kept["verdicts"][0]["said"] = "holds: <script>x</script> [a](javascript:b) \x1b[31m"
    answers.write_text(json.dumps(kept))
    (tmp_path / "outputs" / "c").mkdir()
    (tmp_path / "outputs" / "c" / "expect.json").write_text('{"study": 3}')
    (tmp_path / "outputs" / "b" / "two.png").write_bytes(b"\x89PNG nothing")
    assert main(["--experiments", str(house), str(tmp_path / "outputs")]) == 0
    text, err = (house / "README.md").read_text(), capsys.readouterr().err
    assert "&lt;script&gt;" in text and "<script" not in text and "](javascript" not in text and "\x1b" not in text
    assert (
        "2 of 2 hold" in text and err.count("\n") == 2 and "c/expect.json: cannot be read" in err and "two.png" in err
    )


def test_what_somebody_wrote_among_the_answers_is_shown_as_text(house: Path, tmp_path: Path) -> None:
    """Answers that are kept are cleaned, the same each time; what stands outside of the marks is the user's own."""
    readme = house / "README.md"
    kept = "### `one`\n\n**1 of 2 hold**<script>\n\n- holds: a &lt; b <script>x</script>\x1b[31m\n"
    readme.write_text(f"<b>mine</b>\n{BEGIN}\n{kept}\n{END}\n")
    for _ in range(2):
        assert main(["--experiments", str(house), str(house)]) == 0
        text = readme.read_text()
        assert "- holds: a &lt; b &lt;script&gt;x&lt;/script&gt;" in text and text.startswith("<b>mine</b>")
        assert "<script" not in text and "\x1b" not in text


def test_lines_keep_their_colours(tmp_path: Path) -> None:
    """Thin lines of the palette on a white page with a shaded band; a median cut makes one of the two oranges."""
    lines = [(1, 115, 178), (222, 143, 5), (2, 158, 115), (213, 94, 0)]
    down = Image.linear_gradient("L")
    page = Image.merge("RGB", [down, down.transpose(Image.Transpose.ROTATE_90), down.point(lambda v: 255 - v)])
    page = page.point(lambda v: 150 + v * 2 // 5)
    for row, colour in enumerate(lines):
        page.paste(colour, (20, 50 * row + 20, 30, 50 * row + 21))
    page.save(tmp_path / "page.png")
    copy_small(tmp_path / "page.png", tmp_path / "small.png")
    with Image.open(tmp_path / "small.png") as small:
        for row, colour in enumerate(lines):
            seen = small.convert("RGB").getpixel((25, 50 * row + 20))
            assert isinstance(seen, tuple) and max(abs(a - b) for a, b in zip(seen, colour, strict=True)) <= 12


def test_a_folder_without_a_readme_or_its_marks_is_one_line(house: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        main(["--experiments", str(tmp_path / "nowhere")])
    (house / "README.md").write_text("nothing here\n")
    with pytest.raises(UsageError, match=f"{BEGIN}.*{END}"):
        main(["--experiments", str(house)])
    assert (house / "README.md").read_text() == "nothing here\n"
