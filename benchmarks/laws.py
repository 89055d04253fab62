"""How often a law is recognized from the numbers alone: those of torch, and near ones.

    python -m benchmarks.laws [draws]

prints a table: right, abstained (`too few to tell`) and wrong of so many draws, 1000 by default. A law that is none of
torch's is right as `other`.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import init

from initlab.models.laws import recognize_law

SHAPES = ((64, 64), (256, 128), (512, 512), (64, 32, 3, 3), (1000, 20))
Draw = Callable[[Tensor], Tensor]


def moved(draw: Draw) -> Draw:
    """Weights after a small step of training: a thousandth of their standard deviation."""

    def draw_and_move(x: Tensor) -> Tensor:
        weight = draw(x)
        return weight + 1e-3 * weight.std() * torch.randn_like(weight)

    return draw_and_move


def rounded(draw: Draw, dtype: torch.dtype) -> Draw:
    return lambda x: draw(x).to(dtype)


OF_TORCH: dict[str, tuple[str, Draw]] = {
    "normal_": ("normal", lambda x: init.normal_(x, 0, 0.02)),
    "uniform_": ("uniform", lambda x: init.uniform_(x)),
    "xavier_normal_": ("normal", init.xavier_normal_),
    "xavier_uniform_": ("uniform", init.xavier_uniform_),
    "kaiming_normal_": ("normal", init.kaiming_normal_),
    "kaiming_uniform_": ("uniform", lambda x: init.kaiming_uniform_(x, a=5**0.5)),
    "trunc_normal_": ("cut normal", init.trunc_normal_),
    "trunc_normal_(std=0.02)": ("normal", lambda x: init.trunc_normal_(x, std=0.02)),
    "trunc_normal_(a=-1, b=2)": ("cut normal", lambda x: init.trunc_normal_(x, a=-1, b=2)),
    "orthogonal_": ("orthogonal", lambda x: init.orthogonal_(x, 2**0.5)),
    "constant_": ("constant", lambda x: init.constant_(x, 0.3)),
    "zeros_": ("constant", init.zeros_),
    "eye_ or dirac_": ("identity", lambda x: init.eye_(x) if x.ndim == 2 else init.dirac_(x, 2)),
    "sparse_": ("sparse", lambda x: init.sparse_(x.flatten(1), 0.1)),
}
NEAR: dict[str, Draw] = {
    "Student t, 5": lambda x: torch.distributions.StudentT(5.0).sample(x.shape),
    "Laplace": lambda x: torch.distributions.Laplace(0.0, 1.0).sample(x.shape),
    "two normals, std 1 and 2": lambda x: torch.randn_like(x) * (1 + (torch.rand_like(x) < 0.5).float()),
    "two normals, 2 std apart": lambda x: torch.randn_like(x) + 2 * (torch.rand_like(x) < 0.5).float(),
    "1 % outliers at 5 std": lambda x: torch.where(torch.rand_like(x) < 0.01, 5.0, torch.randn_like(x)),
    "1 % outliers of std 5": lambda x: torch.randn_like(x) * (1 + 4 * (torch.rand_like(x) < 0.01).float()),
    "triangular": lambda x: torch.rand_like(x) - torch.rand_like(x),
    "uniform times normal": lambda x: torch.rand_like(x) * torch.randn_like(x),
    "uniform times orthogonal": lambda x: torch.rand_like(x) * init.orthogonal_(torch.empty_like(x)),
    "exponential": lambda x: torch.empty_like(x).exponential_(),
    "half of it zero": lambda x: torch.randn_like(x).relu(),
    "10 % masked at random": lambda x: torch.randn_like(x) * (torch.rand_like(x) > 0.1),
    "rows of two scales": lambda x: torch.cat([torch.randn_like(x[::2]), 3 * torch.randn_like(x[1::2])]),
}  # fmt: skip


def list_cases() -> dict[str, tuple[str, Draw]]:
    """The name of each case, what is right, and how to draw it."""
    cases = dict(OF_TORCH)
    for name, (law, draw) in OF_TORCH.items():
        if name in ("normal_", "kaiming_uniform_", "trunc_normal_", "orthogonal_"):
            cases[f"{name}, moved"] = law, moved(draw)
            cases[f"{name}, bfloat16"] = law, rounded(draw, torch.bfloat16)
            cases[f"{name}, float16"] = law, rounded(draw, torch.float16)
    return cases | {name: ("other", draw) for name, draw in NEAR.items()}


def count_answers(law: str, draw: Draw, shape: tuple[int, ...], draws: int) -> tuple[Counter[str], Counter[str]]:
    """Right, abstained and wrong; and the wrong names."""
    answers = Counter(recognize_law(draw(torch.empty(shape))).name for _ in range(draws))
    right, abstained = answers.pop(law, 0), answers.pop("too few to tell", 0)
    return Counter(right=right, abstained=abstained, wrong=answers.total()), answers


def main(draws: int) -> None:
    torch.manual_seed(0)
    shapes = ["x".join(map(str, shape)) for shape in SHAPES]
    print(f"right / abstained / wrong of {draws} draws\n")
    print("| law | " + " | ".join(shapes) + " |\n|" + "---|" * (len(shapes) + 1))
    start = time.process_time()
    for name, (law, draw) in list_cases().items():
        cells = []
        for shape in SHAPES:
            counts, names = count_answers(law, draw, shape, draws)
            wrong = f" ({', '.join(names)})" if names else ""
            cells.append(f"{counts['right']} / {counts['abstained']} / {counts['wrong']}{wrong}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.process_time() - start:.0f} s of CPU, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
