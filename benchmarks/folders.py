"""Run folders as a sweep leaves them, made without running it."""

from pathlib import Path

from initlab.runs.parquet import add_constants, as_arrow, write
from initlab.runs.recorder import Recorder
from initlab.runs.schema import OPTION_OF
from initlab.tasks import stack as stacks

DEPTH, SEEDS = 31, range(4)  # 1 + 4 * 31 rows of each network: 500
WORDS = "task init gain_kind mode distribution activation dtype generator matmul data optimizer train_loss modules"


def run_folders(folder: Path, count: int) -> list[Path]:
    """`count` folders as a sweep over the learning rate leaves them, each with 500 rows of `stats`; their files."""
    frame = stacks.stack("kaiming", depth=DEPTH, width=16, batch=8, seeds=SEEDS)
    told = {name: "words" if name in WORDS.split() else 1.0 for name in (*OPTION_OF, "gain")}
    with Recorder(folder / "0", told, "cpu") as recorder:
        recorder.add({"stats": frame})
    said = (folder / "0" / "run.json").read_text(encoding="utf-8")
    files = [folder / str(k) / "stats.parquet" for k in range(count)]
    for k, file in enumerate(files[1:], start=1):  # what a Recorder writes, without asking git each time
        file.parent.mkdir()
        own = {"lr": k / count}
        write(add_constants(as_arrow(frame.assign(mean=frame["mean"] + k)), told | own), file)
        (file.parent / "run.json").write_text(said.replace('"lr": 1.0', f'"lr": {k / count}'), encoding="utf-8")
    return files
