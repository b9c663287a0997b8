"""What may be meant by a word that nothing is known of. Its imports are light: ``plot --help`` waits for none."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from typing import Any


def did_you_mean(word: str, known: Iterable[str], before: str = "") -> str | None:
    """A question with the names that are like the word, whatever their case, with what is written before them."""
    names = {name.lower(): name for name in known}
    near = [before + names[key] for key in get_close_matches(word.lower(), names, n=2, cutoff=0.75)]
    return f"Did you mean {' or '.join(near)}?" if near else None


def meant_options(message: str, options: Iterable[str]) -> str | None:
    """The question for the first option that a parser does not know."""
    unknown = re.match(r"unrecognized arguments: -*([^\s=]+)", message)
    return did_you_mean(unknown[1], [name.lstrip("-") for name in options], before="--") if unknown else None


def remedies(message: str, parser: Any) -> Iterator[str | None]:
    """Questions, and the option that shows what there is, for an error in a configuration."""
    options = parser._option_string_actions
    yield meant_options(message, options)
    if key := re.search(r"does not accept option '(\S+)'", message):
        yield did_you_mean(key[1], [name.lstrip("-") for name in options])
    if choices := re.search(r"(?s)Expected one of ([^\n]*?)(?:\n.*?|\. Got )value: (\S+)", message):
        yield did_you_mean(choices[2], re.findall(r"'(.*?)'", choices[1]))
    attribute = re.search(r"module '(\S+)' has no attribute '(\w+)'", message)
    if attribute and attribute[1] in sys.modules:
        yield did_you_mean(attribute[2], vars(sys.modules[attribute[1]]))
    key = re.match(r'Parser key "((\w+)[\w.]*)"', message)
    names = key.groups() if key else ()
    shown = next((options[f"--{name}.help"] for name in names if f"--{name}.help" in options), None)
    if shown is None:
        return
    classes = dict(_classes(getattr(shown, "_help_types", ())))
    unheard = re.findall(r"No class of this name is known: (\w+)", message)
    if name := next((name for name in unheard if name not in classes), None):
        yield did_you_mean(name, classes) or "A class of your own is named by its path: module.Class."
    if argument := re.search(r"Option '(\w+)' is not accepted", message):
        named = re.findall(r"class_path'?:? '(?:\w+\.)*(\w+)'", message)
        kinds = [classes[n] for n in named if n in classes] or classes.values()
        yield did_you_mean(argument[1], [name for kind in kinds for name in _arguments(kind)])
    yield f"What it takes is shown by {shown.option_strings[0]}{' CLASS' if shown.metavar else ''}."


def _classes(bases: Iterable[type]) -> Iterator[tuple[str, type]]:
    """Those that are imported, by the names that the command line has for them."""
    for base in bases:
        if not base.__name__.startswith("_"):
            yield base.__name__, base
        yield from _classes(base.__subclasses__())


def _arguments(kind: type) -> list[str]:
    from jsonargparse import ArgumentParser  # noqa: PLC0415, see above

    parser = ArgumentParser()
    with suppress(Exception):  # a class of the user's: what is wrong with it is said elsewhere
        parser.add_class_arguments(kind, fail_untyped=False)
    return [action.dest for action in parser._actions]
