"""Verdicts on disk, as JSON that a person can read, so that a large model can be probed once, or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        ValueError: If it is no verdict, is of another version, or has unknown or missing fields.

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
    return {name: _entry(name, entry) for name, entry in content["parameters"].items()}


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


def _entry(name: str, entry: Any) -> ScaleInvariance:
    found = set(entry) if isinstance(entry, Mapping) else set()
    if not _FIELDS - {"holds"} <= found <= _FIELDS:  # "holds" is newer than the first files
        raise _wrong(
            f"The verdict on {name!r} must have the fields of ScaleInvariance, but {sorted(_FIELDS - found)} are "
            f"missing and {sorted(found - _FIELDS)} are unknown."
        )
    for field, known in (("kind", KINDS), ("evidence", EVIDENCE)):
        if entry[field] not in known:
            raise _wrong(f"The {field} of {name!r} must be one of {', '.join(known)}, got {entry[field]!r}.")
    slices = entry["slices"]
    if slices is not None and not all(len(pair) == 2 and 0 <= pair[0] < pair[1] for pair in slices):
        raise _wrong(f"The slices of {name!r} must be pairs (start, stop) with start < stop, got {slices!r}.")
    return ScaleInvariance(**{**entry, "slices": slices and tuple((int(a), int(b)) for a, b in slices)})
