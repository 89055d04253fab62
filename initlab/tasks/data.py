"""The batches' source: digits (shipped), MNIST (from files), a teacher (synthetic). Nothing is fetched unless asked.

Inputs are standardized by the mean and std of the training split, pooled over its pixels, as in the book.
"""

import hashlib
import http.client
import math
import struct
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from initlab.engine.mlp import lin
from initlab.errors import UsageError, choose, show
from initlab.files import check_file, read_bytes, read_gz
from initlab.nn.custom_loss import GivenLoss, as_loss
from initlab.nn.init import gaussian

# The two files of MNIST's training split, with the md5 sums that torchvision publishes.
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
}
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"


# Pixels and bytes of an array that are read whatever the size of its file: MNIST has 47 million of one byte. A larger
# file may hold as many for each of its bytes as a .gz of images does at most.
PIXELS, PIXEL_BYTES, PER_BYTE = 50_000_000, 200_000_000, 8

TEACHER_ROWS = 50_000  # as many as the book's training set


@dataclass(frozen=True)
class Data:
    """A training split: x (n, I) float32, y (n,) int64 classes or float32 values; `classes` None for regression."""

    name: str
    x: Tensor
    y: Tensor
    classes: int | None

    def constant_loss(self, loss: GivenLoss) -> float:
        """The loss of the best answer that does not look at the inputs: the variance of y, or the entropy of classes.

        loss: a name of LOSSES, or one of the user's own, of which nothing is known: inf.
        """
        classes = as_loss(loss).classes
        if classes is None:
            return math.inf
        if not classes:
            return float(self.y.double().var(correction=0))
        shares = torch.bincount(self.y).double() / len(self.y)
        return float(torch.special.entr(shares).sum())


def load(name: str = "digits", root: str | Path = "data/mnist", download: bool = False, url: str = MNIST_URL) -> Data:
    """Load the training split of a source.

    name: `digits` (shipped), `teacher` (drawn), `mnist` (from files). root: MNIST's folder. download: whether its files
    may be fetched from `url`. Errors: an unknown source; files that are missing, broken or not MNIST.

    >>> tuple(load("digits").x.shape)
    (1797, 64)
    """
    return choose(SOURCES, name, "data")(Path(root).expanduser(), download, url)


def as_data(given: Any, name: str) -> Data:
    """Data of the user's own, as they are: nothing is standardized.

    given: a `Data`, or a pair x, y of arrays or tensors. x (n, ...) become n rows of numbers; y (n,) or (n, 1) are
    classes from 0 on where they are integers or truth values, else numbers. name: what tables call them.
    Errors: anything else; numbers that are not real; targets below 0; not as many targets as rows.

    >>> as_data((np.eye(3), [0, 2, 1]), "mine").classes
    3
    """
    if isinstance(given, Data):
        return replace(given, name=name)
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise UsageError(f"data: {name} returns {show(given)}; it must return x, y or an initlab Data")
    try:
        x, y = (one.detach().cpu() if isinstance(one, Tensor) else torch.as_tensor(np.asarray(one)) for one in given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"data: {name} returns no arrays of numbers ({error})") from error
    shapes = f"x {tuple(x.shape)} and y {tuple(y.shape)}"
    if x.is_complex() or y.is_complex():
        raise UsageError(f"data: {name} returns complex numbers; they must be real")
    y = y.squeeze(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    if x.ndim < 1 or not x.numel() or y.shape != x.shape[:1]:
        raise UsageError(f"data: {name} returns {shapes}; x must be (n, ...) and y (n,)")
    x = x.reshape(len(x), -1).to(torch.float32)
    if y.is_floating_point():
        return Data(name, x, y.to(torch.float32), None)
    lowest = int(y.min())
    if lowest < 0:
        raise UsageError(
            f"data: {name} returns the class {lowest}; classes count from 0, and targets to regress are floats"
        )
    return Data(name, x, y.long(), int(y.max()) + 1)


def standardize(pixels: np.ndarray) -> Tensor:
    """Images as rows (n, I), with mean 0 and standard deviation 1 over all pixels of all images."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float32, order="C")
    mean, std = flat.mean(dtype=np.float64), flat.std(dtype=np.float64)
    flat -= np.float32(mean)
    flat /= np.float32(std if std > 0 else 1)
    return torch.from_numpy(flat)


def load_digits(root: Path, download: bool, url: str) -> Data:
    """1,797 images of 8 x 8: the test set of UCI's handwritten digits (Alpaydin & Kaynak 1998)."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        return Data("digits", standardize(stored["images"]), torch.from_numpy(stored["labels"].astype(np.int64)), 10)


def draw_teacher(root: Path, download: bool, url: str) -> Data:
    """50,000 x 784 standard normal inputs, targets of a fixed random 784-50-1 ReLU network, standardized."""
    n, fan_in, hidden = TEACHER_ROWS, 784, 50
    x = gaussian((n, fan_in), 0, "teacher input")
    w1, w2 = (
        gaussian(shape, 0, "teacher", layer) * math.sqrt(2 / shape[0])
        for layer, shape in enumerate([(fan_in, hidden), (hidden, 1)], start=1)
    )
    y = lin(torch.relu(x @ w1), w2, torch.zeros(1)).squeeze(-1)
    return Data("teacher", x, (y - y.mean()) / y.std(), None)


def load_mnist(root: Path, download: bool, url: str) -> Data:
    """MNIST's training split from IDX files (plain or .gz, also in torchvision's MNIST/raw) or from an .npz file."""
    found = find_mnist(root)
    if found is None and download:
        fetch_mnist(root, url)
        found = find_mnist(root)
    if found is None:
        raise UsageError(
            f"data=mnist: no MNIST files in data.root={root}; put train-images-idx3-ubyte and train-labels-idx1-ubyte "
            "(or .gz, or mnist.npz) there, or say data.download=true"
        )
    images, labels = found
    if images.ndim not in (2, 3) or labels.ndim != 1 or not images.size or not labels.size:
        raise UsageError(f"data=mnist: images of shape {images.shape} and labels of shape {labels.shape} are not MNIST")
    if images.dtype.kind not in "buif" or labels.dtype.kind not in "uif" or not np.isfinite(images).all():
        raise UsageError(
            f"data=mnist: images ({images.dtype}) must be finite numbers, labels ({labels.dtype}) integers"
        )
    if len(images) != len(labels):
        raise UsageError(f"data=mnist: {len(images)} images but {len(labels)} labels in data.root={root}")
    if not (labels.min() >= 0 and labels.max() <= 9):
        raise UsageError(f"data=mnist: labels run from {labels.min()} to {labels.max()}, not from 0 to 9")
    if (labels != labels.astype(np.int8)).any():
        raise UsageError("data=mnist: labels must be whole numbers")
    with np.errstate(over="ignore"):
        x = standardize(images)
    if not bool(x.isfinite().all()):
        raise UsageError(f"data=mnist: images ({images.dtype}) must be numbers that float32 can hold")
    return Data("mnist", x, torch.from_numpy(labels.astype(np.int64)), 10)


SOURCES: dict[str, Callable[[Path, bool, str], Data]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "teacher": draw_teacher,
}


def find_mnist(root: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Images and labels, or None where a file is missing; IDX before .npz."""
    paths = []
    for name in MNIST_FILES:
        plain = name.removesuffix(".gz")
        spellings = (plain, name, plain.replace("-idx", ".idx"))
        candidates = [folder / spelling for folder in (root, root / "MNIST" / "raw") for spelling in spellings]
        paths.append(next((path for path in candidates if path.is_file()), None))
    images, labels = paths
    if images and labels:
        return read_idx(images), read_idx(labels)
    archives = sorted(root.glob("*.npz"), key=lambda path: (path.name != "mnist.npz", path.name))
    return read_npz(archives[0]) if archives else None


def check_promise(path: Path, count: int, bytes_each: int) -> None:
    """Refuse a header that promises more numbers than the size of its file warrants, before there is an array."""
    more = PER_BYTE * check_file(path)
    if count > max(PIXELS, more) or count * bytes_each > max(PIXEL_BYTES, more):
        raise UsageError(
            f"{path}: {check_file(path):,} bytes that promise {count:,} numbers; no images are packed like that"
        )


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`x_train` and `y_train`, as Keras names them."""
    check_file(path)
    try:
        with zipfile.ZipFile(path) as stored:
            images, labels = (_read_npy(path, stored, name) for name in ("x_train", "y_train"))
            return images, labels
    except UsageError:
        raise
    except KeyError as error:
        raise UsageError(f"{path}: no array {error.args[0]}; x_train and y_train are needed") from error
    except Exception as error:  # whatever zipfile and numpy raise is about the file
        raise UsageError(f"{path}: not a readable .npz file ({error or type(error).__name__})") from error


def _read_npy(path: Path, stored: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an archive, once its header is known to be one of numbers and not too large."""
    if f"{name}.npy" not in stored.namelist():
        raise KeyError(name)
    check_promise(path, 1, stored.getinfo(f"{name}.npy").file_size)  # its header alone may be all of it
    with stored.open(f"{name}.npy") as file:
        newer = np.lib.format.read_magic(file) != (1, 0)
        header = np.lib.format.read_array_header_2_0 if newer else np.lib.format.read_array_header_1_0
        shape, _, dtype = header(file)
    if dtype.kind not in "buif":
        raise ValueError(f"{name} holds {dtype}, not numbers")
    check_promise(path, math.prod(shape), dtype.itemsize)
    with stored.open(f"{name}.npy") as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, type 8, the number of dimensions, each size, the data."""
    most = max(PIXELS, PER_BYTE * check_file(path)) + 16  # with the longest header
    raw = read_gz(path, most) if path.suffix == ".gz" else read_bytes(path, math.inf)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 3:
        raise UsageError(f"{path}: not an IDX file of unsigned bytes in one to three dimensions")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise UsageError(f"{path}: cut short inside its header, {len(raw)} of {start} bytes")
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if len(raw) != start + math.prod(shape):
        raise UsageError(
            f"{path}: its header promises {start + math.prod(shape)} bytes for shape {shape}, the file has {len(raw)}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def fetch_mnist(root: Path, url: str) -> None:
    """Download what is missing, once, and keep a file only if its md5 sum is right."""
    for name, md5 in MNIST_FILES.items():
        if (root / name).is_file():
            continue
        source = url.rstrip("/") + "/" + name
        try:
            with urllib.request.urlopen(source, timeout=30) as answer:
                raw = answer.read(PIXELS)  # many times what the files have
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UsageError(
                f"data=mnist: {source} cannot be fetched ({reason}); set data.root= to a folder of files"
            ) from error
        if hashlib.md5(raw, usedforsecurity=False).hexdigest() != md5:
            raise UsageError(f"data=mnist: {source} has the wrong md5 sum; nothing was kept")
        try:
            root.mkdir(parents=True, exist_ok=True)
            partial = root / (name + ".part")
            partial.write_bytes(raw)
            partial.replace(root / name)
        except OSError as error:
            raise UsageError(f"data=mnist: data.root={root} cannot be written ({error.strerror})") from error
