"""The matmul ladder: one product c[i, j] = sum over k of a[i, k] b[k, j], rewritten rung by rung until it is fast.

Every rung is called as f(a, b) with a (M, K) and b (K, N) and gives c (M, N). They differ in the order of their sums,
hence in the last bits; nan and inf run through all of them. `rungs.py` checks what is given, goes beyond the book, and
holds the table that `task=matmul` times.
"""

import torch
from torch import Tensor


def loops(a: Tensor, b: Tensor) -> Tensor:
    """Three nested loops over tensors: the definition, and a dispatch of torch for every number."""
    (m, k), n = a.shape, b.shape[1]
    c = a.new_zeros(m, n)
    for i in range(m):
        for j in range(n):
            for l in range(k):  # noqa: E741 - i, j, l are the book's letters' neighbours
                c[i, j] += a[i, l] * b[l, j]
    return c


def lists(a: Tensor, b: Tensor) -> Tensor:
    """Three nested loops over Python lists: no dispatch. Sums in float64, as Python does, and rounds once."""
    (m, k), n = a.shape, b.shape[1]
    x, y = a.tolist(), b.tolist()
    c = [[0.0] * n for _ in range(m)]
    for i in range(m):
        for j in range(n):
            for l in range(k):  # noqa: E741
                c[i][j] += x[i][l] * y[l][j]
    return torch.tensor(c, dtype=torch.float64).reshape(m, n).to(a)


def elementwise(a: Tensor, b: Tensor) -> Tensor:
    """An elementwise product and a sum for the inner loop: c[i, j] = sum(a[i] * b[:, j])."""
    (m, _), n = a.shape, b.shape[1]
    c = a.new_zeros(m, n)
    for i in range(m):
        for j in range(n):
            c[i, j] = (a[i] * b[:, j]).sum()
    return c


def row(a: Tensor, b: Tensor) -> Tensor:
    """Broadcasting one row at a time: c[i] = sum over k of a[i, k, None] * b, a (K, N) product for every row."""
    c = a.new_zeros(a.shape[0], b.shape[1])
    for i in range(a.shape[0]):
        c[i] = (a[i].unsqueeze(-1) * b).sum(0)
    return c


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Broadcasting with no loop: all M K N products at once, in memory, then one sum."""
    return (a.unsqueeze(-1) * b).sum(1)


def einsum(a: Tensor, b: Tensor) -> Tensor:
    """Einstein's notation: the index that is not in the result is summed over."""
    return torch.einsum("ik,kj->ij", a, b)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The operator `@`: the processor's own matrix product."""
    return a @ b
