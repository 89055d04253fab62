import gzip
import hashlib
import http.server
import struct
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from initlab.errors import UsageError
from initlab.tasks import data
from initlab.tasks.data import load, read_idx

IMAGES = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
LABELS = np.array([3, 1, 4, 1, 5, 9], np.uint8)


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    return tmp_path


def test_digits_are_shipped_and_standardized() -> None:
    digits = load("digits")
    assert digits.x.shape == (1797, 64) and digits.classes == 10
    assert abs(float(digits.x.double().mean())) < 1e-6
    assert float(digits.x.double().std(correction=0)) == pytest.approx(1, rel=1e-6)
    assert torch.bincount(digits.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_teacher_has_the_shape_of_the_book_and_something_to_learn() -> None:
    teacher = load("teacher")
    assert teacher.x.shape == (50_000, 784) and teacher.y.shape == (50_000,) and teacher.classes is None
    assert float(teacher.y.std()) == pytest.approx(1, rel=1e-4)
    linear = torch.linalg.lstsq(teacher.x[:5000], teacher.y[:5000].unsqueeze(1)).solution
    explained = 1 - float((teacher.x[5000:] @ linear).squeeze().sub(teacher.y[5000:]).square().mean())
    assert explained > 0.3  # half of a ReLU network is linear in its inputs
    assert torch.equal(load("teacher").y, teacher.y)


def test_mnist_from_plain_gz_and_nested_idx_files(mnist: Path) -> None:
    plain = load("mnist", mnist)
    assert plain.y.tolist() == LABELS.tolist() and plain.x.shape == (6, 16) and plain.classes == 10
    expected = (IMAGES.reshape(6, 16) - IMAGES.mean()) / IMAGES.std()
    np.testing.assert_allclose(plain.x, expected, rtol=1e-5)
    nested = mnist / "MNIST" / "raw"
    nested.mkdir(parents=True)
    for path in list(mnist.glob("train-*")):
        (nested / (path.name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert torch.equal(load("mnist", mnist).x, plain.x)


def test_mnist_from_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", x_train=IMAGES, y_train=LABELS)
    assert load("mnist", tmp_path).y.tolist() == LABELS.tolist()


def test_every_fault_of_a_file_is_one_line_that_names_it(mnist: Path, tmp_path: Path) -> None:
    images, labels = mnist / "train-images-idx3-ubyte", mnist / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    cases: list[tuple[bytes, bytes, str]] = [
        (whole[:-5], idx(LABELS), "header promises 112 bytes .* the file has 107"),
        (whole + b"\0", idx(LABELS), "the file has 113"),
        (whole[:9], idx(LABELS), "cut short inside its header"),
        (b"", idx(LABELS), "not an IDX file"),
        (b"PNG" + whole, idx(LABELS), "not an IDX file"),
        (whole, idx(LABELS[:5]), "6 images but 5 labels"),
        (whole, idx(LABELS + 3), "labels run from 4 to 12"),
        (idx(LABELS), idx(LABELS), "are not MNIST"),
    ]
    for image_bytes, label_bytes, text in cases:
        images.write_bytes(image_bytes)
        labels.write_bytes(label_bytes)
        with pytest.raises(UsageError, match=text) as caught:
            load("mnist", mnist)
        assert "\n" not in str(caught.value)


def test_a_gz_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx(IMAGES))[:-12])
    with pytest.raises(UsageError, match=r"cannot be read"):
        read_idx(path)


def test_broken_npz_files(tmp_path: Path) -> None:
    (tmp_path / "mnist.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(UsageError, match="not a readable"):
        load("mnist", tmp_path)
    np.savez(tmp_path / "mnist.npz", images=IMAGES)
    with pytest.raises(UsageError, match="x_train and y_train"):
        load("mnist", tmp_path)


def test_no_files_and_nothing_fetched(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no MNIST files .* data.download=true"):
        load("mnist", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UsageError, match="did you mean mnist"):
        load("mnits")


@pytest.fixture
def server(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """A mirror on this machine that counts what it is asked for."""
    served = tmp_path_factory.mktemp("mirror")
    for path in mnist.glob("train-*"):
        (served / (path.name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *rest: object) -> None:
            super().__init__(*rest, directory=str(served))  # type: ignore[arg-type]

        def log_message(self, *rest: object) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join()


def test_download_once_with_a_checksum(
    server: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = server
    root = tmp_path_factory.mktemp("root") / "new"
    with pytest.raises(UsageError, match="wrong md5 sum"):
        load("mnist", root, download=True, url=url)
    assert not root.exists()
    sums = {name: hashlib.md5(urllib.request.urlopen(f"{url}/{name}").read()).hexdigest() for name in data.MNIST_FILES}
    monkeypatch.setattr(data, "MNIST_FILES", sums)
    asked.clear()
    assert load("mnist", root, download=True, url=url).y.tolist() == LABELS.tolist()
    assert len(asked) == 2
    assert load("mnist", root, download=True, url=url).y.tolist() == LABELS.tolist()
    assert len(asked) == 2 and sorted(p.name for p in root.iterdir()) == sorted(sums)


def test_no_network_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be fetched .* data.root="):
        load("mnist", tmp_path, download=True, url="http://127.0.0.1:9")
