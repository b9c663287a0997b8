"""The quantities of the package once more, in NumPy float64 and plain loops, written from their equations.

Shares no code and no library with the package. The angle has another formula, and its sums are exact, in integers.
"""

import math
from collections.abc import Sequence

import numpy as np

Index = tuple[int, ...]


def unit_indices(shape: Sequence[int], unit: str | int = "neuron", dim: int = 0, groups: int = 1) -> list[list[Index]]:
    """Index tuples of the entries of every unit: a neuron, as many neighbouring ones as ``unit`` says, or all.

    With ``dim=1`` and ``groups`` as PyTorch documents transposed convolutions: the weight has shape
    ``(in, out / groups, *kernel)``, the first ``in / groups`` input channels make the first ``out / groups`` output
    channels, and so on.
    """
    if unit == "layer" or len(shape) < 2:
        return [list(np.ndindex(*shape))]
    units: list[list[Index]] = [[] for _ in range(shape[dim] * groups if dim else shape[0])]
    for index in np.ndindex(*shape):
        group = index[0] * groups // shape[0] if dim else 0
        units[group * shape[dim] + index[dim]].append(index)
    size = unit if isinstance(unit, int) else 1
    return [[index for neuron in units[i : i + size] for index in neuron] for i in range(0, len(units), size)]


def entries(array: np.ndarray, indices: list[Index]) -> list[float]:
    """The real numbers at the indices; a complex entry is two of them."""
    numbers = [complex(array[index]) for index in indices]
    parts = [[z.real, z.imag] if np.iscomplexobj(array) else [z.real] for z in numbers]
    return [x for pair in parts for x in pair]


def norm(values: list[float]) -> float:
    """√Σx²."""
    return math.sqrt(math.fsum(x * x for x in values))


def units(array: np.ndarray, unit: str | int = "neuron", dim: int = 0, groups: int = 1) -> list[list[float]]:
    """Entries of every unit."""
    return [entries(array, indices) for indices in unit_indices(array.shape, unit, dim, groups)]


def unit_norms(array: np.ndarray, unit: str | int = "neuron", dim: int = 0, groups: int = 1) -> list[float]:
    """‖w_u‖."""
    return [norm(values) for values in units(array, unit, dim, groups)]


def weight_norm(array: np.ndarray) -> float:
    """‖w‖, from all entries at once."""
    return norm(entries(array, list(np.ndindex(*array.shape))))


def root_mean_square(values: Sequence[float]) -> float:
    """√(Σx² / U), 0 for no values."""
    return norm(list(values)) / math.sqrt(len(values)) if values else 0.0


def rotation(before: np.ndarray, after: np.ndarray, unit: str | int = "neuron", dim: int = 0, groups: int = 1):
    """Rotation of every unit in radians, to the last digits of float64 at any angle; 0 where either is zero."""
    pairs = zip(units(before, unit, dim, groups), units(after, unit, dim, groups), strict=True)
    return [angle(integers(a), integers(b)) for a, b in pairs]


def integers(values: list[float]) -> list[int]:
    """The values times a common power of two, exactly."""
    ratios = [value.as_integer_ratio() for value in values]
    scale = max((denominator for _, denominator in ratios), default=1)
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def angle(a: list[int], b: list[int]) -> float:
    """atan2(√(‖a‖²‖b‖² − ⟨a, b⟩²), ⟨a, b⟩), both divided by ‖a‖‖b‖ to stay in the range of floats."""
    squares = sum(x * x for x in a) * sum(y * y for y in b)
    product = sum(x * y for x, y in zip(a, b, strict=True))
    if squares == 0:
        return 0.0
    sine, cosine = math.sqrt((squares - product**2) / squares), math.sqrt(product**2 / squares)
    return math.atan2(sine, math.copysign(cosine, product))


def relative_update(before: np.ndarray, after: np.ndarray, unit: str | int = "neuron", dim: int = 0, groups: int = 1):
    """‖after_u − before_u‖ / ‖before_u‖; 0 where it is zero before."""
    updates = unit_norms(after - before, unit, dim, groups)
    norms = unit_norms(before, unit, dim, groups)
    return [u / n if n else 0.0 for u, n in zip(updates, norms, strict=True)]


def gradient_alignment(
    weight: np.ndarray, gradient: np.ndarray, unit: str | int = "neuron", dim: int = 0, groups: int = 1
):
    """|⟨w_u, g_u⟩| / (‖w_u‖ ‖g_u‖); 0 where either is zero."""
    cosines = []
    for w, g in zip(units(weight, unit, dim, groups), units(gradient, unit, dim, groups), strict=True):
        product = abs(math.fsum(x * y for x, y in zip(w, g, strict=True)))
        cosines.append(product / (norm(w) * norm(g)) if product else 0.0)
    return cosines


def effective_lr(lr: float, n: float, exponent: int) -> float:
    """η / n^p, infinite at n = 0."""
    return lr / n**exponent if n or not exponent else math.inf


def projected(array: np.ndarray, radius: Sequence[float], unit: str | int = "neuron", dim: int = 0, groups: int = 1):
    """R w_u / ‖w_u‖ for every unit, a zero unit as it is."""
    result = array.copy()
    for r, indices in zip(radius, unit_indices(array.shape, unit, dim, groups), strict=True):
        length = norm(entries(array, indices))
        for index in indices:
            result[index] = array[index] * (float(r) / length) if length else array[index]
    return result
