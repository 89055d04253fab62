"""The door for files from elsewhere: a value of the right form, or one line that names the file."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from initlab import files
from initlab.errors import UsageError

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{','.join([f'*{chr(97 + k)}'] * 9)}]\n" for k in range(9)
)
FORM: files.Form = {"a": str, "b": [int], "c": {...: (str, type(None))}, "d": lambda value: value == 3}


def refusal(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    "read", [files.read_bytes, files.read_json, files.read_yaml, lambda path: files.read_gz(path, 9)]
)
def test_only_regular_files_are_opened(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder"):
        assert "not a file" in refusal(read, tmp_path / name)
    for name in ("itself", "nowhere"):
        assert "cannot be read" in refusal(read, tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"b": ' + "9" * 5000 + "}",
        "[1]",
        '{"a": 3}',
        '{"b": [1, "x"]}',
        '{"c": {"x": []}}',
        '{"d": 4}',
        "",
    ],
)
def test_json_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    refusal(lambda path: files.read_json(path, FORM), tmp_path / "x.json")


def test_texts_lose_what_a_terminal_would_obey(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": "\\u001b[31m\\u202e", "c": {"\\u0007": null}, "b": [1]}')
    assert files.read_json(tmp_path / "x.json", FORM) == {"a": "\\x1b[31m\\u202e", "c": {"\\x07": None}, "b": [1]}
    (tmp_path / "x.yaml").write_text('a: "\\e[31m"\nb: &b [1]\nother: *b\n')
    assert files.read_yaml(tmp_path / "x.yaml", FORM) == {"a": "\\x1b[31m", "b": [1], "other": [1]}


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "&a [*a, *a]",
        "[" * 500,
        "a: " + ":".join(["59"] * 5000),
        "a: 2026-99-99",
        "!!python/name:os.system",
        "? []\n: 1",
    ],
    ids=["aliases", "itself", "deep", "sixty", "date", "code", "key"],
)
def test_yaml_that_grows_or_runs_something_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    refusal(files.read_yaml, tmp_path / "x.yaml")


def test_what_is_packed_is_unpacked_as_far_as_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(10**6)))
    assert len(files.read_gz(tmp_path / "x.gz", 10**6)) == 10**6
    assert "unpacks to more" in refusal(lambda path: files.read_gz(path, 10**6 - 1), tmp_path / "x.gz")
