"""What a user can do wrong, said in one line: what was given, what is allowed, the nearest match.

Every room raises `UsageError` for a mistake in what it was asked; anything else that is raised is a fault of ours.
Numbers, truth values and choices of options and of library calls are checked here and nowhere else.
"""

import errno
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from numbers import Real
from reprlib import Repr
from typing import Any, NamedTuple, ParamSpec, TypeVar

Row = TypeVar("Row")
P = ParamSpec("P")
R = TypeVar("R")


class Limits(NamedTuple):
    """What a number may be: from the lowest to the highest."""

    lowest: float = 0
    highest: float = 3e38  # the largest number of float32, in which all is drawn and most is computed
    whole: bool = False
    above: bool = False  # the lowest itself is refused
    below: bool = False  # and the highest
    optional: bool = False  # None is allowed, and stands for what the function says


def _count(lowest: int, highest: int, optional: bool = False) -> Limits:
    return Limits(lowest, highest, whole=True, optional=optional)


# Every number that an option or a parameter takes. Parameters have the names of options, less what stands before a dot;
# what stands there twice has other limits in training or in the phase plane.
LIMITS: dict[str, Limits] = {
    "depth": _count(1, 10**5),
    "width": _count(1, 10**12),
    "inputs": _count(1, 10**12, optional=True),
    "batch": _count(1, 10**12),
    "seed": _count(0, 2**62),  # kept as an integer of 64 bits
    "seeds": _count(1, 10**6),
    "every": _count(1, 10**12),
    "flush_steps": _count(1, 10**12),
    "threads": _count(1, 1024),  # more no library starts
    "networks": _count(2, 10**6, optional=True),
    "gain": Limits(highest=1e150, optional=True),  # theory squares it
    "init.critical": Limits(highest=1e5),
    "bias": Limits(),
    "attempts": _count(0, 10**6),
    "tolerance": Limits(above=True),
    "base_width": _count(0, 10**12),
    "train.depth": _count(0, 10**5),
    "train.width": _count(1, 10**12),
    "train.batch": _count(1, 10**12),
    "train.steps": _count(1, 10**12),
    "train.lr": Limits(highest=1e30),  # Adam multiplies it before it divides
    "sigma_w": Limits(highest=1e5),  # beyond, no table of fixed points goes
    "sigma_b": Limits(highest=1e5),
    "q0": Limits(above=True),
    "c0": Limits(0, 1, below=True),
    "phase.batch": _count(2, 10**12),  # one input has no cosine
    "phase.sigma_b": Limits(highest=1e5),
    "phase.correlation": Limits(0, 1, below=True),
}
TRUTHS = frozenset(
    (
        "backward",
        "input_gradient",
        "residual",
        "progress",
        "histograms",
        "train.drift",
        "wide",
        "outputs",
        "fixed_input",
        "plots",
        "report",
        "merged",
    )
)
_GROUPS = ("train", "phase")


_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


LONGEST = 300  # characters of a line about a mistake
LONGEST_WORD = 160


def printable(text: str) -> str:
    """The text with whatever a terminal would obey, or not show, spelt out: a line break becomes the two signs \\n."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shorten(text: str, most: int) -> str:
    """The text, or its two ends where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 + 5 :]}"


class UsageError(ValueError):
    """A mistake of the user; its text is one printable line that fits on a screen, whatever was given."""

    def __init__(self, text: str = "") -> None:
        words = re.sub(r"\s*[\r\n]+\s*", " ", str(text).strip()).split(" ")
        line = " ".join(shorten(printable(word), LONGEST_WORD) for word in words)
        super().__init__(shorten(line, LONGEST))


def join_mistakes(lines: Iterable[str]) -> list[str]:
    """Mistakes of many jobs: values that are wrong for one reason together, as many in a line as it holds."""
    given: dict[str, list[str]] = {}
    for line in dict.fromkeys(lines):
        what, _, why = line.partition(": ")
        given.setdefault(why, []).append(what)
    joined: list[str] = []
    for why, whats in given.items():
        text = ": ".join(filter(None, (shorten(", ".join(whats), LONGEST_WORD), why)))
        if joined and len(joined[-1]) + len(text) < LONGEST:
            joined[-1] += f"; {text}"
        else:
            joined.append(text)
    return joined


class Fault(Exception):
    """What went wrong in a job, in one line: it travels between processes where the error itself might not."""


def show(value: object) -> str:
    """Anything that a user may give, as a text of some words in one line."""
    try:
        text = f"{value!r}".removesuffix(".0") if isinstance(value, float) else _short.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = type(value).__name__
    return " ".join(text.split())


def describe_error(error: BaseException) -> str:
    """What an error of others' code says, in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return shorten(text, LONGEST_WORD)


CURES = {
    (errno.ENOSPC, errno.EDQUOT): "free some space",
    (errno.EROFS, errno.EACCES, errno.EPERM): "choose a folder that may be written to",
    (errno.ENOTDIR, errno.EEXIST): "a file stands where a folder should be: move it",
    (errno.ENOENT, errno.ESTALE): "leave the folder in its place while something is written there",
    (errno.EFBIG,): "raise the limit on the size of a file",
    (errno.EMFILE, errno.ENFILE): "raise the limit on open files",
}
# Never a fault of the program, wherever it is met.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)


def disk_error(error: OSError, path: object) -> UsageError:
    """What the disk refused, in one line: where, why, and what can be done."""
    cure = next((text for numbers, text in CURES.items() if error.errno in numbers), "see to the disk")
    why = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
    return UsageError(f"{path}: cannot be written ({why}); {cure}, or choose another folder")


@contextmanager
def report_disk(path: object) -> Iterator[None]:
    """Within the block files are written or removed: an OSError becomes one line with this path."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


# What other programs and papers call the things that have a name here.
OTHER_NAMES = {
    **dict.fromkeys(("he", "he_normal", "he_uniform", "msra", "delving"), "kaiming"),
    **dict.fromkeys(("glorot", "glorot_normal", "glorot_uniform", "bengio"), "xavier"),
    **dict.fromkeys(("default", "pytorch", "torch", "kaiming_uniform_a5"), "torch_default"),
    **dict.fromkeys(("normal", "gaussian", "standard_normal"), "naive"),
    **dict.fromkeys(("identity", "none"), "linear"),
    **dict.fromkeys(("logistic", "sigm"), "sigmoid"),
    **dict.fromkeys(("fp16", "half", "f16"), "float16"),
    **dict.fromkeys(("bf16", "brain"), "bfloat16"),
    **dict.fromkeys(("fp32", "single", "float", "f32"), "float32"),
    **dict.fromkeys(("fp64", "double", "f64"), "float64"),
    **dict.fromkeys(("gpu", "nvidia"), "cuda"),
    **dict.fromkeys(("lr", "learning_rate", "train.learning_rate", "train.rate", "eta"), "train.lr"),
    **dict.fromkeys(("epochs", "steps", "iterations", "train.epochs"), "train.steps"),
    **dict.fromkeys(("batch_size", "bs"), "batch"),
    **dict.fromkeys(("train.batch_size", "train.bs"), "train.batch"),
    **dict.fromkeys(("layers", "n_layers", "num_layers"), "depth"),
    **dict.fromkeys(("hidden", "units", "n", "hidden_size", "features"), "width"),
    **dict.fromkeys(("nonlinearity", "nonlin", "act", "phi"), "activation"),
    **dict.fromkeys(("sd", "std_dev", "stddev", "sigma"), "std"),
    **dict.fromkeys(("loss", "criterion"), "train.loss"),
    **dict.fromkeys(("ce", "xent", "nll", "crossentropy"), "cross_entropy"),
    **dict.fromkeys(("l2", "squared_error"), "mse"),
}


def nearest(given: str, allowed: Iterable[str]) -> str:
    """' - did you mean X?', or nothing where nothing is near."""
    by_lower = {name.lower(): name for name in allowed}
    known = OTHER_NAMES.get(given.lower().replace("-", "_"))
    if known in by_lower:
        return f" - did you mean {by_lower[known]}?"
    match = get_close_matches(given.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" - did you mean {by_lower[match[0]]}?" if match else ""


def not_one_of(what: str, given: object, allowed: Iterable[str]) -> UsageError:
    names, text = sorted(allowed), show(given)
    text = text[1:-1] if isinstance(given, str) else text
    return UsageError(f"{what}={text}: must be one of {', '.join(names)}{nearest(text, names)}")


def choose(table: Mapping[str, Row], name: object, what: str) -> Row:
    """The row of a table (or the column of a frame), or one line that lists its names."""
    if not isinstance(name, str) or name not in table:
        raise not_one_of(what, name, table)
    return table[name]


def plain(value: Any) -> Any:
    """numpy's numbers and arrays, and torch's, as Python's numbers and lists; everything else as it is."""
    try:
        return value.tolist() if callable(getattr(value, "tolist", None)) else value
    except RuntimeError:  # a tensor without data
        return value


def as_several(given: Any, kind: Any) -> Iterator[Any]:
    """What is inside of something that was given, or itself where it is of a kind that counts as one, or holds nothing.

    One after the other, so that the first that is wrong ends it, however many there are.
    """
    try:
        return iter([given] if isinstance(given, kind) else given)
    except TypeError:
        return iter([given])


def check(**options: object) -> list[Any]:
    """The numbers and truth values as Python's own, in this order; what is none, or out of its range, is refused.

    Names are those of options and parameters; `train_depth` stands for the option `train.depth`.
    """
    found = []
    for key, value in options.items():
        group, _, name = key.partition("_")
        found.append(check_value(f"{group}.{name}" if group in _GROUPS else key, value))
    return found


def check_value(option: str, given: object, limits: Limits | None = None) -> Any:
    """A number or a truth value as Python's own, or one line on what it must be; `limits` in place of the table's."""
    value: Any = plain(given)
    if option in TRUTHS:
        if not isinstance(value, bool):
            raise UsageError(f"{option}={show(given)}: must be True or False")
        return value
    limits = limits or LIMITS[option]
    if value is None and limits.optional:
        return None
    what = f"{option}={show(value)}"
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise UsageError(f"{what}: must be a {'whole ' if limits.whole else ''}number")
    if not -math.inf < value < math.inf:
        raise UsageError(f"{what}: must be finite")
    if limits.whole and value != value // 1:
        raise UsageError(f"{what}: must be a whole number")
    if value < limits.lowest or (limits.above and value == limits.lowest):
        raise UsageError(f"{what}: must be {'above' if limits.above else 'at least'} {show(limits.lowest)}")
    if value > limits.highest or (limits.below and value == limits.highest):
        raise UsageError(f"{what}: must be {'below' if limits.below else 'at most'} {show(limits.highest)}")
    return int(value) if limits.whole else float(value)


def keep_checked(record: object, names: Iterable[str], group: str = "") -> None:
    """`check_value` for fields of a dataclass that is being made; they become Python's own numbers."""
    for name in names:
        object.__setattr__(record, name, check_value(group + name, getattr(record, name)))


def check_functions(**functions: object) -> None:
    """Refuse what is neither a function nor None."""
    for name, given in functions.items():
        if given is not None and not callable(given):
            raise UsageError(f"{name}={show(given)}: must be a function")


def library_call(function: Callable[P, R]) -> Callable[P, R]:
    """A function of the library: its mistakes name its parameters, `depth` where the option is `train.depth`.

    An argument that it does not take is a mistake too.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = next((nearest(name, signature.parameters) for name in kwargs if f"'{name}'" in str(error)), "")
            raise UsageError(f"{function.__name__}: {error}{unknown}") from None
        try:
            return function(*args, **kwargs)
        except UsageError as error:
            error.args = (re.sub(r"(?<![\w./])(train|init)\.(?=[a-z])", "", str(error)),)
            raise

    return call
