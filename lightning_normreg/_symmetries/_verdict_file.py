"""Verdicts on disk, as JSON that a person can read, so that a large model can be probed once, or elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning_normreg._weights import EVIDENCE, KINDS, ScaleInvariance

FORMAT = "lightning_normreg.scale_invariance"
VERSION = 1
_FIELDS = {f.name for f in fields(ScaleInvariance)}


def save_verdict(verdict: Mapping[str, ScaleInvariance], path: str | Path) -> None:
    """Write a verdict to a JSON file.

    Args:
        verdict: As :func:`find_scale_invariance` returns it.
        path: Of the file; an existing one is replaced.
    """
    Path(path).write_text(json.dumps(verdict_to_dict(verdict), indent=1) + "\n", encoding="utf-8")


def verdict_to_dict(verdict: Mapping[str, ScaleInvariance]) -> dict[str, Any]:
    """Plain types, for JSON or a checkpoint; the reverse is :func:`load_verdict`.

    >>> sorted(verdict_to_dict({"weight": ScaleInvariance("none")}))
    ['format', 'parameters', 'version']
    """
    parameters = {name: asdict(v) for name, v in verdict.items()}
    for entry in parameters.values():
        entry["slices"] = entry["slices"] and [list(pair) for pair in entry["slices"]]
    return {"format": FORMAT, "version": VERSION, "parameters": parameters}


def load_verdict(source: str | Path | Mapping[str, Any]) -> dict[str, ScaleInvariance]:
    """Read a verdict back.

    Args:
        source: Path of a file by :func:`save_verdict`; the mapping that is in it; or a verdict, which is copied.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no verdict, is of another version, has unknown or missing fields, or values that make no
            sense; named with the file.

    Examples:
        >>> verdict = {"conv.weight": ScaleInvariance("block", dim=0, block_size=2, slices=((0, 4),), z=1e-15)}
        >>> load_verdict(verdict_to_dict(verdict)) == verdict
        True
    """
    if isinstance(source, Mapping) and source and all(isinstance(v, ScaleInvariance) for v in source.values()):
        return dict(source)
    content = source if isinstance(source, Mapping) else _read(Path(source))
    where = "the mapping" if isinstance(source, Mapping) else f"{str(source)!r}"
    if content.get("format") != FORMAT or not isinstance(content.get("parameters"), Mapping):
        raise _wrong(f"A verdict must say 'format': {FORMAT!r} and have 'parameters', but {where} does not.")
    if content.get("version") != VERSION:
        raise _wrong(f"A verdict must be of version {VERSION}, but {where} is of {content.get('version')!r}.")
    names = content["parameters"].keys()
    return {name: _entry(name, entry, names, where) for name, entry in content["parameters"].items()}


def _wrong(what: str) -> ValueError:
    return ValueError(f"{what} Write it with save_verdict(find_scale_invariance(...), path).")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _wrong(f"A verdict must be JSON, but {str(path)!r} is not ({error}).") from error
    if not isinstance(content, Mapping):
        raise _wrong(f"A verdict must be a JSON object, but {str(path)!r} holds a {type(content).__name__}.")
    return content


def _entry(name: str, entry: Any, names: Collection[str], where: str) -> ScaleInvariance:
    found = set(entry) if isinstance(entry, Mapping) else set()
    if not _FIELDS - {"holds", "of", "masked"} <= found <= _FIELDS:  # these are newer than the first files
        raise _wrong(
            f"The verdict on {name!r} in {where} must have the fields of ScaleInvariance, but "
            f"{sorted(_FIELDS - found)} are missing and {sorted(found - _FIELDS)} are unknown."
        )
    for field, (rule, holds) in _RULES.items():
        if not holds(entry.get(field, True)):
            raise _wrong(f"The {field} of {name!r} in {where} must be {rule}, got {entry[field]!r}.")
    bias, slices = entry["needs_bias"], entry["slices"]
    if bias is not None and (bias == name or bias not in names):
        raise _wrong(f"The needs_bias of {name!r} in {where} must be another parameter of it, got {bias!r}.")
    return ScaleInvariance(**{**entry, "slices": slices and tuple((a, b) for a, b in slices)})


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, most: float) -> bool:
    return value is None or (isinstance(value, (int, float)) and 0 <= value <= most)  # NaN is not


def _are_ranges(value: Any) -> bool:
    """None, or ranges one after the other that do not overlap."""
    if value is None:
        return True
    if not isinstance(value, (list, tuple)) or not all(isinstance(r, (list, tuple)) and len(r) == 2 for r in value):
        return False
    flat = [end for pair in value for end in pair]
    ordered = all(_is_int(end, 0) for end in flat) and flat == sorted(flat)
    return ordered and all(start < stop for start, stop in value)


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kind": (f"one of {', '.join(KINDS)}", lambda v: v in KINDS),
    "evidence": (f"one of {', '.join(EVIDENCE)}", lambda v: v in EVIDENCE),
    "dim": ("a dimension or null", lambda v: v is None or _is_int(v, 0)),
    "groups": ("an integer of at least 1", lambda v: _is_int(v, 1)),
    "block_size": ("an integer of at least 1, or null", lambda v: v is None or _is_int(v, 1)),
    "slices": ("pairs (start, stop) of integers in order that do not overlap, start < stop", _are_ranges),
    "z": ("a number of at least 0, or null", lambda v: _is_number(v, math.inf)),
    "rho_median": ("a share from 0 to 1, or null", lambda v: _is_number(v, 1.0)),
    "rho_worst": ("a share from 0 to 1, or null", lambda v: _is_number(v, 1.0)),
    "masked": ("a share from 0 to 1", lambda v: v is not None and _is_number(v, 1.0)),
    "standardized": ("true or false", lambda v: isinstance(v, bool)),
    "holds": ("true or false", lambda v: isinstance(v, bool)),
    "reason": ("text", lambda v: isinstance(v, str)),
}
