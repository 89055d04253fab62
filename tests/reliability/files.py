"""Damaged and odd files, one at a time, through every door that reads it: the others are read, the damaged is named.

A folder of runs, a study and images is made once. A case copies it, spoils one file (bits, blocks, types, nesting,
columns), and reads it by `read`, `collect`, `compare`, `gallery`, `resume=` or `data=mnist`, in a forked child.
"""

import gzip
import json
import random
import re
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

import initlab
from initlab.__main__ import main
from initlab.runs import parquet
from initlab.studies.gallery import BEGIN, END
from initlab.tasks.data import load
from tests.reliability.attack import Case
from tests.reliability.forks import isolate, run_forked

LARGE = 1000
SWEEP = ("-m", "init=naive,kaiming", "depth=2", "width=3", "batch=3", "seeds=2", "train.steps=2", "train.width=3")
SWEEP += ("plots=false", "report=false", "device=cpu")
TABLES = ("stats", "losses", "parity", "theory")
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3.5,
    1e308,
    float("nan"),
    10**30,
    2**63,
    "",
    "abc",
    "\x1b[31mred\x07",
    "a\nb",
)
ODD += (
    [],
    [[]],
    {},
    {"a": 1},
    [1, "a", None],
    {"a": {"b": [{}]}},
    "x" * 5000,
    "<script>alert(1)</script>",
    "\u202eabc",
)


def build(folder: Path) -> None:
    """What the cases copy: a sweep, its study's answers and figure, the folder of studies, images."""

    def sweep() -> int:
        sys.argv = ["initlab", *SWEEP, "hydra.sweep.dir=sweep"]
        return main()

    code, _, err = run_forked(sweep, folder)
    assert code == 0, err
    verdicts = [{"say": "it is", "holds": True, "measured": [], "said": "holds: it is (measured 1)"}]
    kept = {"study": "one", "overrides": [], "holds": 1, "of": 1, "verdicts": verdicts}
    (folder / "sweep" / "expect.json").write_text(json.dumps(kept))
    Image.effect_noise((60, 40), 50).save(folder / "sweep" / "one.png")
    (folder / "experiments").mkdir()
    about = {"study": {"question": "Is it?", "source": "a book", "cost": {"runs": 2, "cpu_seconds": 1.5}}}
    (folder / "experiments" / "one.yaml").write_text(yaml.safe_dump(about))
    (folder / "experiments" / "README.md").write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    images, labels = np.arange(96, dtype=np.uint8).reshape(6, 4, 4), np.array([3, 1, 4, 1, 5, 9], np.uint8)
    for name in ("idx", "gz", "npz"):
        (folder / name).mkdir()
    np.savez_compressed(folder / "npz" / "mnist.npz", x_train=images, y_train=labels)
    for stem, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        (folder / "idx" / stem).write_bytes(raw)
        (folder / "gz" / f"{stem}.gz").write_bytes(gzip.compress(raw))


def _flip(draw: random.Random, raw: bytearray) -> None:
    for _ in range(draw.choice((1, 1, 1, 2, 8, 64))):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)


def _cut(draw: random.Random, raw: bytearray) -> None:
    del raw[draw.choice((0, 1, 7, draw.randrange(len(raw)), len(raw) - 1)) :]


def _zero(draw: random.Random, raw: bytearray) -> None:
    start, count = draw.randrange(len(raw)), draw.choice((4, 64, 512))
    raw[start : start + count] = bytes(len(raw[start : start + count]))


def _swap(draw: random.Random, raw: bytearray) -> None:
    size = draw.choice((4, 64, 512))
    a, b = (draw.randrange(max(1, len(raw) - size)) for _ in range(2))
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]


def _insert(draw: random.Random, raw: bytearray) -> None:
    start = draw.randrange(len(raw))
    raw[start:start] = draw.randbytes(draw.choice((1, 4, 100)))


def _drop(draw: random.Random, raw: bytearray) -> None:
    start = draw.randrange(len(raw))
    del raw[start : start + draw.choice((1, 4, 100))]


def _noise(draw: random.Random, raw: bytearray) -> None:
    raw[:] = draw.randbytes(draw.choice((0, 1, 100, 5000)))


BYTES = (_flip, _flip, _flip, _cut, _zero, _swap, _insert, _drop, _noise)


def spoil_bytes(draw: random.Random, path: Path) -> str:
    """Damage that any file can have."""
    raw = bytearray(path.read_bytes())
    how = draw.choice(BYTES)
    how(draw, raw)
    path.write_bytes(raw)
    return how.__name__


def spoil_value(draw: random.Random, value: Any) -> Any:
    """The same value with something odd at a place that is drawn."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        if draw.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: spoil_value(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.6:
        k = draw.randrange(len(value))
        return [*value[:k], spoil_value(draw, value[k]), *value[k + 1 :]]
    return draw.choice(ODD)


def spoil_text(draw: random.Random, path: Path) -> str:
    """Another value of JSON or YAML, or one that is deep, long, or repeats itself."""
    load_text, dump = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    deep = draw.choice((60, 900, 100_000))
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + k)}: &{chr(98 + k)} [{','.join([f'*{chr(97 + k)}'] * 9)}]\n" for k in range(9)
    )
    kinds = ("value", "value", "value", "value", "deep", "bomb", "itself", "sixty", "tag", "twice")
    kind = draw.choice(kinds)
    texts = {
        "deep": "[" * deep + "]" * deep,
        "bomb": bomb,
        "itself": "&a [*a, *a]",
        "sixty": "a: " + ":".join(["59"] * 50_000),
        "tag": "!!python/object/apply:os.system ['true']",
        "twice": path.read_text() * 2,
    }
    path.write_text(texts[kind] if kind in texts else str(dump(spoil_value(draw, load_text(path.read_text())))))
    return kind


def spoil_table(draw: random.Random, path: Path) -> str:
    """Other columns, other types, other rows, sealed like ours or written by somebody else."""
    table = pq.read_table(path)
    name = draw.choice(table.column_names)
    column = table.column_names.index(name)
    odd: list[Any] = draw.choice(([None], [True], [1.5], [10**15], ["\x1b[31m"], [b"\xff"], [[1, 2]], [{"a": 1}], [-1]))
    kind = draw.choice(("drop", "retype", "retype", "rename", "double", "empty", "rows twice", "metadata", "many"))
    if kind == "drop":
        table = table.drop_columns([name])
    elif kind == "retype":
        table = table.set_column(column, name, pa.array(odd * table.num_rows))
    elif kind == "rename":
        new = draw.choice(("\x1b[31m", "", "run", "x" * 3000, "seed", parquet.FILE))
        table = table.rename_columns([new if one == name else one for one in table.column_names])
    elif kind == "double":
        table = table.append_column(name, table[name])
    elif kind == "empty":
        table = table.slice(0, draw.choice((0, 1)))
    elif kind == "rows twice":
        table = pa.concat_tables([table, table])
    elif kind == "many":
        table = pa.table({f"c{k}": [1] for k in range(draw.choice((50, 3000)))})
    metadata = {b"initlab": draw.choice((b"[]", b"{", b"3", b'{"collected": true}', b"\xff", b"[" * 5000))}
    table = table.replace_schema_metadata(metadata if kind == "metadata" else None)
    about = path.parent / "run.json"
    if draw.random() < 0.4 and kind not in ("metadata", "double"):  # initlab writes no two columns of one name
        parquet.write(table, path)
        return f"{kind} {name}, sealed"
    pq.write_table(table, path, compression=draw.choice(("snappy", "zstd", "none")))
    said = json.loads(about.read_text())
    about.write_text(json.dumps(said | {"schema_version": 1}))
    return f"{kind} {name} {odd}"


def read_runs(truth: Path, spoilt: Path | None) -> Callable[[], int]:
    """`initlab.read` of every table: what is there of a file is what was written, and the other run is whole."""

    def call() -> int:
        warnings.simplefilter("ignore")
        for name in TABLES:
            whole = {k: pd.read_parquet(truth / "sweep" / k / f"{name}.parquet") for k in ("0", "1")}
            try:
                frame = initlab.read("**", table=name)
            except initlab.errors.UsageError:
                continue
            for k, rows in whole.items():
                mine = frame[frame["run"].astype(str) == f"sweep/{k}"]
                damaged = spoilt is not None and spoilt.parts[:2] == ("sweep", k)
                if len(mine) == 0 and damaged:
                    continue
                numbers = [c for c in rows if rows[c].dtype.kind in "if"]
                np.testing.assert_array_equal(mine[numbers].to_numpy(float), rows[numbers].to_numpy(float))
        return 0

    return call


def run_words(*words: str) -> Callable[[], int]:
    """A command line."""

    def call() -> int:
        sys.argv = ["initlab", *words]
        return main()

    return call


def load_images(folder: str) -> Callable[[], int]:
    def call() -> int:
        try:
            data = load("mnist", folder)
        except initlab.errors.UsageError as error:
            assert str(error).isprintable() and len(str(error)) < 330
            return 2
        assert bool(data.x.isfinite().all()) and data.x.shape[0] == data.y.shape[0]
        return 0

    return call


RUN_FILES = [f"sweep/{k}/{name}.parquet" for k in "01" for name in TABLES]
TEXTS = ["sweep/0/run.json", "sweep/1/run.json", "sweep/multirun.yaml", "sweep/expect.json", "experiments/one.yaml"]
TEXTS += ["sweep/0/.hydra/overrides.yaml", "sweep/1/.hydra/hydra.yaml"]
OTHERS = ["sweep/one.png", "experiments/README.md", "npz/mnist.npz", "gz/train-images-idx3-ubyte.gz"]
OTHERS += ["gz/train-labels-idx1-ubyte.gz", "idx/train-images-idx3-ubyte", "idx/train-labels-idx1-ubyte"]


def doors_of(name: str, truth: Path, whole: bool) -> list[Callable[[], int]]:
    """The doors that read a file; `whole` where its numbers must be those that were written."""
    top = name.split("/")[0]
    if top in ("idx", "gz", "npz"):
        return [load_images(top)]
    if top == "experiments" or name.endswith(("expect.json", ".png")):
        return [run_words("gallery", "--experiments", "experiments", "sweep")]
    resume = run_words(*SWEEP, "resume=sweep")
    if "hydra" in name or "multirun" in name:
        return [resume]
    read = read_runs(truth, Path(name)) if whole else run_words("collect", ".", "--to", "all.csv")
    compare, collect = run_words("compare", "sweep/0", "sweep/1"), run_words("collect", ".")
    return [read, read, collect, compare, run_words("gallery", "--experiments", "experiments", "."), resume]


def what_is_wrong(code: int, out: str, err: str) -> str:
    """Nothing, or the first thing that was not as promised."""
    shown = err.strip().replace("\n", " | ")[-300:]
    if code not in (0, 2, 3):
        return f"exit code {code}: {shown}"
    if "Traceback" in out + err:
        return f"traceback: {shown}"
    odd = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", out + err)
    return f"control character {odd[0]!r}" if odd else ""


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    return isolate("files", count, seed, folder)


def attempts(count: int, seed: int, folder: str) -> Iterator[Case]:
    truth = Path(folder, "truth")
    build(truth)
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        name = draw.choice(draw.choices((RUN_FILES, TEXTS, OTHERS), (5, 4, 3))[0])
        here = Path(folder, str(number))
        shutil.copytree(truth, here)
        kinds: list[Callable[[random.Random, Path], str]] = [spoil_bytes]
        kinds += [spoil_table] if name.endswith(".parquet") else [spoil_text, spoil_text] if name in TEXTS else []
        spoil = draw.choice(kinds)
        how = spoil(draw, here / name)
        whole = spoil is not spoil_table and not name.endswith("run.json")
        door = draw.choice(doors_of(name, truth, whole))
        readme = here / "experiments" / "README.md"
        before = readme.read_bytes()
        code, out, err = run_forked(door, here)
        wrong = what_is_wrong(code, out, err)
        written = b"" if readme.read_bytes() == before else readme.read_bytes()
        generated = written.partition(BEGIN.encode())[2].partition(END.encode())[0]  # the rest is the user's own
        if b"<script" in generated or b"\x1b" in generated:
            wrong = wrong or "a tag or an escape sequence in the README"
        yield Case(f"{seed} {number}: {name}, {how}, {door.__qualname__.split('.')[0]}", wrong)
        shutil.rmtree(here)
