"""The formulas of the table of activations, as functions of one number in mpmath's precision."""

from collections.abc import Callable

import mpmath
import sympy

from initlab.nn.activations import ACTIVATIONS

Function = Callable[[mpmath.mpf], mpmath.mpf]


def formulas(name: str) -> tuple[Function, Function]:
    """phi and phi' of an activation, from the texts of its row."""
    z = sympy.Symbol("z", real=True)
    row = ACTIVATIONS[name]
    phi, slope = (
        sympy.lambdify(z, sympy.sympify(text, locals={"z": z}), "mpmath") for text in (row.formula, row.derivative)
    )
    return lambda value: mpmath.mpf(phi(value)), lambda value: mpmath.mpf(slope(value))
