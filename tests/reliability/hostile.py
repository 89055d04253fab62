"""Files made to do harm: bombs, pipes, devices, links, code, escape sequences, tags, each through a door that reads it.

Every case is read in a forked child that may take 1 GiB more than the program itself, and 10 s of CPU: it ends in one
line or in a right result, runs nothing, and lets nothing through to the terminal or to a README.
"""

import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from initlab.runs import parquet
from tests.reliability.attack import Case
from tests.reliability.files import SWEEP, build, load_images, run_words
from tests.reliability.forks import isolate, run_forked

LARGE = 200
MEMORY, SECONDS = 2**30, 10  # the bars
WRITTEN = "pwned"  # the file that code in a file would leave
ESCAPES = ("\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "a\rb", "\u202egnp", "\x08\x08", "<script>alert(1)</script>")


def pack_idx(path: Path, shape: tuple[int, ...], body: int) -> None:
    """An IDX file in a .gz: a header that promises a shape, and so many zeros."""
    head = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    with gzip.open(path, "wb") as file:
        file.write(head)
        for _ in range(body // 2**20):
            file.write(bytes(2**20))


def bomb_gz(draw: random.Random, here: Path) -> str:
    size = draw.choice((60, 300, 700))
    shape = draw.choice(((size, 2**10, 2**10), (size * 2**20,), (2**32 - 1,) * 3, (2**31, 1, 1)))
    pack_idx(here / "gz" / "train-images-idx3-ubyte.gz", shape, size * 2**20)
    return f"{size} MiB, {shape}"


def bomb_npz(draw: random.Random, here: Path) -> str:
    """Headers that promise what is not there, are not what they seem, or hold code."""
    shape = draw.choice(
        ((2**40,), (2**64,), (10**30, 3), (60_000, 28, 28), (2**31, 2**31), (-1, 4, 4), (2**28,), (0, 5))
    )
    kind = draw.choice(("|u1", "<f8", "|O", "<c16", ">i4", "<U1000", "|V8", "bomb"))
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"
    if kind == "bomb":
        head = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 2)

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (WRITTEN,))

    body = pickle.dumps([Code()]) if kind == "|O" else b""
    with zipfile.ZipFile(here / "npz" / "mnist.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x_train", "y_train"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(head + body)
                for _ in range(draw.choice((0, 64, 400)) if name == "x_train" else 0):
                    file.write(bytes(2**20))
    return f"{kind} {shape}"


def bomb_table(draw: random.Random, here: Path) -> str:
    """A few bytes that stand for very many numbers or very long texts."""
    path = here / "sweep" / "0" / "stats.parquet"
    kind = draw.choice(("rows", "text", "lists", "columns", "repeated"))
    groups = draw.choice((60, 150))
    sealed = draw.random() < 0.5
    if kind == "columns":
        table, groups = pa.table({f"c{k}": [1.0] for k in range(30_000)}), 1
    elif kind == "text":
        long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), ["x" * 10**6])
        table, groups = pa.table({"stage": long}), 3
    elif kind == "repeated":
        table, groups = pa.table({f"c{k}": pa.array(["y" * 1000] * 10**4) for k in range(30)}), 2
    elif kind == "lists":
        table, groups = pa.table({"x": pa.array([[0] * 10**5] * 10)}), groups
    else:
        table = pa.table({f"c{k}": np.zeros(10**6) for k in range(3)})
        groups = 35 if sealed else groups  # LZ4 leaves more of a bomb: 4 MiB
    if sealed:
        with parquet.open_writer(path, table.schema) as write_rows:
            for _ in range(groups):
                write_rows(table)
    else:
        with pq.ParquetWriter(path, table.schema, compression=draw.choice(("zstd", "snappy"))) as writer:
            for _ in range(groups):
                writer.write_table(table)
        about = json.loads((path.parent / "run.json").read_text())
        (path.parent / "run.json").write_text(json.dumps(about | {"schema_version": 1}))
    return f"{kind} x {groups}, {'sealed' if sealed else 'of others'}, {path.stat().st_size:,} bytes"


def bomb_text(draw: random.Random, here: Path) -> str:
    """JSON and YAML of at most 4 MiB that grow when they are read."""
    name = draw.choice(("sweep/0/run.json", "sweep/expect.json", "sweep/multirun.yaml", "experiments/one.yaml"))
    name = draw.choice((name, "sweep/0/.hydra/overrides.yaml", "sweep/0/.hydra/hydra.yaml"))
    aliases = "a0: &a0 [x]\n" + "".join(f"a{k + 1}: &a{k + 1} [{','.join([f'*a{k}'] * 9)}]\n" for k in range(30))
    begun = (here / "sweep" / "multirun.yaml").read_text()
    texts = {
        "deep": "[" * 2 * 2**20 + "]" * 2 * 2**20,
        "many": "[" + ",".join(["[]"] * 1_300_000) + "]",
        "numbers": '{"seeds": [' + "1e9," * 900_000 + "1]}",
        "keys": "{" + ",".join(f'"{k}":{{}}' for k in range(300_000)) + "}",
        "digits": '{"overrides": ' + "9" * 4_000_000 + "}",
        "aliases": aliases,
        "merge": "a: &a {b: 1}\n" + "c: {" + ", ".join(["<<: *a"] * 50_000) + "}",
        "range": begun.replace("depth=2", "seed=range(0,1000000000000)"),
        "product": begun.replace("depth=2", "depth=range(1,100000)").replace("width=3", "width=range(1,100000)"),
        "sixty": "a: " + "59:" * 600_000 + "59",
        "nul": "\0" * 4_000_000,
        "ids": "- " + "&" + "a" * 3_000_000 + " x",
    }
    kind = draw.choice(list(texts))
    (here / name).write_text(texts[kind])
    return f"{kind} as {name}"


def place_special(draw: random.Random, here: Path) -> str:
    """A pipe, a device, a folder, or a link to one, where a file should be."""
    name = draw.choice(
        ("sweep/0/stats.parquet", "sweep/0/run.json", "sweep/expect.json", "sweep/multirun.yaml", "sweep/one.png")
    )
    name = draw.choice((name, "idx/train-images-idx3-ubyte", "npz/mnist.npz", "gz/train-labels-idx1-ubyte.gz"))
    name = draw.choice((name, "sweep/0/.hydra/overrides.yaml", "experiments/one.yaml", "sweep/0/.hydra/hydra.yaml"))
    path = here / name
    path.unlink()
    kind = draw.choice(("pipe", "zero", "random", "folder", "itself", "nowhere", "tty", "mem"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        targets = {"zero": "/dev/zero", "random": "/dev/urandom", "itself": path.name, "nowhere": "no/such"}
        path.symlink_to(targets.get(kind, {"tty": "/dev/tty", "mem": "/proc/self/mem"}.get(kind, "")))
    return f"{kind} as {name}"


def write_signs(draw: random.Random, here: Path) -> str:
    """Escape sequences and tags in every text that is shown: of run.json, answers, columns, names of folders."""
    sign = draw.choice(ESCAPES)
    kind = draw.choice(
        ("status", "columns", "notes", "said", "folder", "column", "study", "versions", "table", "question")
    )
    run_json, answers = here / "sweep" / "0" / "run.json", here / "sweep" / "expect.json"
    if kind == "folder":
        (here / "sweep" / "0").rename(here / "sweep" / sign.replace("/", "|"))
    elif kind in ("column", "table"):
        table = pq.read_table(here / "sweep" / "0" / "stats.parquet")
        if kind == "column":
            table = table.rename_columns([sign if name == "mode" else name for name in table.column_names])
        else:
            table = table.set_column(0, "stage", pa.array([sign] * len(table))).append_column(
                "note", pa.array([sign] * len(table))
            )
        parquet.write(table, here / "sweep" / "0" / "stats.parquet")
    elif kind == "question":
        (here / "experiments" / "one.yaml").write_text(
            json.dumps({"study": {"question": sign, "source": sign, "cost": {}}})
        )
    elif kind in ("said", "study"):
        kept = json.loads(answers.read_text())
        kept |= {"verdicts": [{"said": f"holds: {sign}"}]} if kind == "said" else {"study": sign}
        answers.write_text(json.dumps(kept))
    else:
        about = json.loads(run_json.read_text())
        odd = {"status": sign, "columns": {sign: sign, "task": sign}, "notes": [sign], "versions": {"initlab": sign}}
        run_json.write_text(json.dumps(about | {kind: odd[kind]}))
    return f"{kind} {sign!r}"


def write_code(draw: random.Random, here: Path) -> str:
    """Tags of YAML and interpolations that would run something."""
    name = draw.choice(
        ("sweep/multirun.yaml", "sweep/0/.hydra/overrides.yaml", "experiments/one.yaml", "sweep/0/.hydra/hydra.yaml")
    )
    codes = (
        f"!!python/object/apply:os.mkdir ['{WRITTEN}']",
        f"!!python/object/new:os.system ['mkdir {WRITTEN}']",
        f"{{_target_: os.mkdir, path: {WRITTEN}}}",
        f"a: !!python/object/apply:subprocess.run [['mkdir', '{WRITTEN}']]",
        "${oc.env:HOME}",
        "${hydra:runtime.cwd}",
    )
    code = draw.choice(codes)
    text = draw.choice((code, f"study: {code}\n", f"- {code}\n", f"hydra: {code}\ntask: lab\n"))
    (here / name).write_text(text)
    return f"{text!r} as {name}"


def bomb_picture(draw: random.Random, here: Path) -> str:
    """A figure of very many pixels in a few bytes."""
    side = draw.choice((3_000, 20_000, 60_000, 2**31 - 1))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    out = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    out.seek(0, os.SEEK_END)
    out.write(chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)))
    out.write(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(draw.choice((10, 300)) * 2**20))))
    out.write(chunk(b"IDAT", zlib.compress(bytes(min(side, 3000) * 3 * 3000))) + chunk(b"IEND", b""))
    (here / "sweep" / "one.png").write_bytes(out.getvalue())
    return f"{side} x {side}"


KINDS = (bomb_gz, bomb_npz, bomb_table, bomb_text, bomb_text, place_special, place_special, write_signs, write_signs)
KINDS += (write_code, bomb_picture)


def attempts(count: int, seed: int, folder: str) -> Iterator[Case]:
    import shutil

    truth = Path(folder, "truth")
    build(truth)
    gallery = run_words("gallery", "--experiments", "experiments", ".")
    resume = run_words(*SWEEP, "resume=sweep")
    runs = (run_words("collect", "sweep"), run_words("compare", "sweep/0", "sweep/1"), gallery, resume)
    runs += (run_words("collect", ".", "--to", "all.parquet"), run_words("collect", "**"))
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        here = Path(folder, str(number))
        shutil.copytree(truth, here)
        kind = draw.choice(KINDS)
        what = kind(draw, here)
        place = next((top for top in ("gz", "npz", "idx") if f"as {top}/" in what or kind.__name__.endswith(top)), "")
        pictured = kind is bomb_picture or any(name in what for name in ("one.", "expect", "said", "study", "question"))
        door = load_images(place) if place else gallery if pictured else draw.choice(runs)
        measures = door is resume  # it trains, too
        code, out, err = run_forked(door, here, SECONDS, 0 if measures else MEMORY)
        shown = err.strip().replace("\n", " | ")[-300:]
        wrong = ""
        if code not in (0, 2, 3) or "Traceback" in out + err:
            wrong = f"exit code {code}: {shown}"
        elif re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out + err):
            wrong = f"control characters: {(out + err)!r}"[:300]
        elif (here / WRITTEN).exists():
            wrong = "code was run"
        elif re.search(rb"<script|\x1b|\xe2\x80\xae", (here / "experiments" / "README.md").read_bytes()):
            wrong = "a tag or an escape sequence in the README"
        yield Case(f"{seed} {number}: {kind.__name__} {what}"[:250], wrong)
        shutil.rmtree(here)


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    return isolate("hostile", count, seed, folder)
