"""What rotation control, projection and the bare optimizer take out of a recipe.

``python -m tests.benchmarks.elimination_table`` prints the table of docs/recipes.md, in about a minute.
"""

from __future__ import annotations

from tests.elimination import (
    DECAYS,
    FACTORS,
    LOSSES,
    OPTIMIZERS,
    SCALES,
    control,
    control_at_initial,
    difference,
    projection,
)


def markdown() -> str:
    """Largest angles in radians between the directions of two runs, over 50 steps and all units."""
    factors = f"× {FACTORS[0]:g} … {FACTORS[-1]:g}"
    changes = {f"initial norms {factors}": SCALES, "decay 0 → 0.1": DECAYS, f"loss {factors}": LOSSES}
    held = {"control": control, 'control, `radius="initial"`': control_at_initial, "projection": projection,
            "bare": None}  # fmt: skip
    lines = [f"| changed | optimizer | {' | '.join(held)} |", "| --- " * (2 + len(held)) + "|"]
    for change, settings in changes.items():
        for optimizer in OPTIMIZERS:
            cells = [f"{difference(optimizer, how, settings):.0e}" for how in held.values()]
            lines.append(f"| {change} | {optimizer} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
