"""Choosing parameters by globs over clean names; a glob that matches nothing is an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})


def clean_name(name: str) -> str:
    """Name of a parameter without the segments that ``torch.compile``, FSDP and checkpointing put in.

    >>> clean_name("encoder._orig_mod.0.weight")
    'encoder.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def match(glob: str, names: Mapping[str, Sequence[str]], argument: str) -> list[str]:
    """Names that a glob matches, by themselves or by an alias.

    Args:
        glob: Pattern of :mod:`fnmatch`, case-sensitive.
        names: For each name its aliases (the other names of a tied parameter).
        argument: The user's argument, for the error.

    Raises:
        ValueError: If nothing matches; near misses are named.
    """
    found = [name for name, aliases in names.items() if any(fnmatchcase(n, glob) for n in (name, *aliases))]
    if not found:
        raise ValueError(_nothing(glob, list(names), argument))
    return found


def select(
    names: Mapping[str, Sequence[str]], include: Iterable[str] | None, exclude: Iterable[str], default: Iterable[str]
) -> list[str]:
    """Names that ``include`` matches (``default`` where it is None), less those that ``exclude`` does, in order."""
    wanted = set(default) if include is None else {n for glob in include for n in match(glob, names, "include")}
    unwanted = {n for glob in exclude for n in match(glob, names, "exclude")}
    chosen = wanted - unwanted
    return [name for name in names if name in chosen]


def check_globs(argument: str, globs: object) -> None:
    """Raise a ``TypeError`` unless ``globs`` is a list of strings: a single one would be read letter by letter."""
    if isinstance(globs, str) or not isinstance(globs, Sequence) or not all(isinstance(g, str) for g in globs):
        raise TypeError(f"`{argument}` must be a list of globs, got {globs!r}. Use for example ['*.weight'].")


def counted(number: int, what: str) -> str:
    """A number and what it counts, in the plural where there is not one: "1 weight", "2 weights"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are.

    >>> listed(["conv1", "conv2", "head"], most=2)
    'conv1, conv2 and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _nothing(glob: str, names: list[str], argument: str) -> str:
    near = difflib.get_close_matches(glob, names, n=3, cutoff=0.4) or names[:3]
    hint = f"Near misses: {', '.join(map(repr, near))}." if near else "The module has no parameters."
    return f"`{argument}` must match at least one parameter, but {glob!r} matches none. {hint}"
