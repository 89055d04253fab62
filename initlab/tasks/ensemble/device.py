"""Where the tensors live, in which number format, drawn by whom, and how a GPU multiplies them."""

import warnings
from dataclasses import dataclass, field

import torch

from initlab.errors import UsageError, choose, not_one_of, show
from initlab.nn.init import GENERATORS
from initlab.stats.dtypes import resolve_dtype

DEVICES: dict[str, str] = {"auto": "the GPU if there is one", "cpu": "the processor", "cuda": "the GPU, or an error"}

# How a GPU multiplies float32 matrices; bfloat16 throughout is dtype=bfloat16.
MATMULS: dict[str, str] = {
    "ieee": "24 bits of mantissa, as on a CPU",
    "tf32": "11 bits of mantissa, several times faster",
}


@dataclass(frozen=True)
class Where:
    """The number format and the device of a computation, and the generator of its random numbers."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    generator: str = "philox"

    @classmethod
    def resolve(
        cls, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu", generator: str = "philox"
    ) -> "Where":
        """From what a user says: names, or torch's own objects. Errors: an unknown format, device or generator."""
        choose(GENERATORS, generator, "generator")
        return cls(resolve_dtype(dtype), find_device(device), generator)


def find_device(device: str | torch.device) -> torch.device:
    """torch's device: `cpu`, `cuda`, `cuda:1`, a torch.device, or `auto`, which takes the GPU if there is one.

    Errors: another kind of device; a GPU that is not there, which is never replaced in silence.
    """
    name = str(device) if isinstance(device, str | torch.device) else show(device)
    kind, _, number = name.partition(":")
    if kind not in DEVICES or (number and (kind == "auto" or not number.isdigit())):
        raise not_one_of("device", name, DEVICES)
    count = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cuda" and not count:
        raise UsageError(
            f"device={name}: torch sees no CUDA GPU here; use device=cpu or device=auto (device=auto|cpu|cuda)"
        )
    if kind == "cuda" and number and int(number) >= count:
        raise UsageError(f"device={name}: torch sees {count} GPU(s) here, the first of them is cuda:0")
    if kind == "auto":
        return torch.device("cuda" if count else "cpu")
    return torch.device(kind if kind == "cpu" else name)


def drops_subnormals(dtype: str | torch.dtype, device: str | torch.device = "cpu") -> bool:
    """Whether a product of matrices takes the subnormal numbers of a format for 0: one is multiplied by the identity.

    dtype: the number format, such as "bfloat16", which most CPUs flush. device: the machine that multiplies.
    Errors: an unknown format or device.

    >>> drops_subnormals("float64")
    False
    """
    where = find_device(device)
    kind = resolve_dtype(dtype)
    half = torch.full((1, 64, 64), torch.finfo(kind).tiny / 2, dtype=torch.float64).to(where, kind)
    return not bool((half @ torch.eye(64, dtype=kind, device=where)).any())


def set_matmul(name: str) -> None:
    """Choose how this process multiplies float32 matrices on a GPU, a name of MATMULS. Nothing changes on a CPU.

    By the older of torch's two switches: it keeps both alike, while the newer (`fp32_precision`) makes every later look
    at the older one an error, also torch.compile's own. Some versions warn of it.
    """
    choose(MATMULS, name, "matmul")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
