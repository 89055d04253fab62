"""Where the tensors live, and how a GPU multiplies them."""

import warnings

import torch

from initlab.errors import UsageError, choose

DEVICES: dict[str, str] = {"auto": "the GPU if there is one", "cpu": "the processor", "cuda": "the GPU, or an error"}

# How a GPU multiplies float32 matrices; bfloat16 throughout is dtype=bfloat16.
MATMULS: dict[str, str] = {
    "ieee": "24 bits of mantissa, as on a CPU",
    "tf32": "11 bits of mantissa, several times faster",
}


def find_device(name: str) -> torch.device:
    """`auto` takes the GPU if there is one; `cuda` without one is an error, never a silent change."""
    choose(DEVICES, name, "device")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UsageError(
            "device=cuda: torch sees no CUDA GPU here; use device=cpu or device=auto (device=auto|cpu|cuda)"
        )
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def set_matmul(name: str) -> None:
    """For the whole process. Nothing changes on a CPU.

    By the older of torch's two switches: it keeps both alike, while the newer (`fp32_precision`) makes every later look
    at the older one an error, also torch.compile's own. Some versions warn of it.
    """
    choose(MATMULS, name, "matmul")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
