"""Which errors are those of arguments, and of which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from traceback import walk_tb
from types import FrameType
from typing import Any

from jsonargparse import Namespace

from lightning_normreg._compat import is_named

DEBUG_HINT = "(JSONARGPARSE_DEBUG=true shows where.)"

LIBRARIES = ("lightning_normreg.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "torch.")


class ArgumentRefused(ValueError):
    """An argument, named by its key in the configuration, that was parsed, but that its taker refuses."""

    def __init__(self, key: str, reason: object) -> None:
        super().__init__(f"{key}: {reason}")


@contextmanager
def blamed_on(
    key: str, errors: tuple[type[Exception], ...] = (Exception,), hint: str = f" {DEBUG_HINT}"
) -> Iterator[None]:
    """Name the key of what is made from its arguments alone, so that they are to blame for its errors."""
    try:
        yield
    except ArgumentRefused:
        raise
    except errors as error:
        raise ArgumentRefused(key, f"{error}{hint}") from error


def refusals_of(key: str) -> AbstractContextManager[None]:
    """Name the key of an argument that one of this package's functions or a file refuses."""
    return blamed_on(key, (ValueError, TypeError, OSError), hint="")


def message_for_user(
    error: BaseException, config: Mapping[str, Any], defaults: Mapping[str, str], constructing: bool
) -> str | None:
    """What to tell the user, or None where the error is a bug and wants its traceback.

    Errors of arguments are what the constructors named in the configuration refuse (``constructing``: before there is
    a Trainer), Lightning's own word for a wrong set-up, and what this package refuses when it sees the model.
    ``defaults`` has the keys of classes that are there without being named, by the name of the class.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for known in chain:
        if isinstance(known, ArgumentRefused):
            return str(known)
    root = chain[-1]
    frames = [frame for frame, _ in walk_tb(root.__traceback__)]
    if not constructing and any(not frame.f_globals.get("__name__", "").startswith(LIBRARIES) for frame in frames):
        return None  # it came by the user's code
    ours = bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("lightning_normreg.")
    refused = isinstance(root, (ValueError, TypeError, NotImplementedError, ModuleNotFoundError)) and ours
    if refused or is_named(root, "MisconfigurationException"):
        said = str(root)
    elif isinstance(root, ValueError) and constructing:
        said = f"{root} {DEBUG_HINT}"
    else:
        return None
    return ": ".join([*_keys(frames, config, defaults), said])


def _keys(frames: list[FrameType], config: Mapping[str, Any], defaults: Mapping[str, str]) -> list[str]:
    """Where the configuration names the object in whose method an error arose: one entry, or none."""
    named = dict(_class_paths(config, ""))
    for frame in frames:
        owner = type(frame.f_locals.get("self")).__name__
        keys = [key for key, path in named.items() if path.rpartition(".")[2] == owner]
        if keys or owner in defaults:
            return [" or ".join(keys) or defaults[owner]]
    return []


def _class_paths(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Keys and class paths of everything that a configuration names."""
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _class_paths(entry, f"{key}[{number}]")
    elif isinstance(value, (Namespace, Mapping)):
        entries = vars(value) if isinstance(value, Namespace) else value
        if isinstance(entries.get("class_path"), str):
            yield key, entries["class_path"]
        for name, entry in entries.items():
            yield from _class_paths(entry, f"{key}.{name}".lstrip("."))
