"""Which of Lightning's two namespaces a model is of, found out before the parser is made for one of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from lightning_normreg._compat import pl


def namespace_of(model_class: object, args: Any = None) -> str:
    """That of a LightningModule, or of the one that arguments name; the default where nothing says otherwise."""
    if model_class is None:
        paths = list(_model_paths(sys.argv[1:] if args is None else args))
        with suppress(Exception):  # the parser imports it again, and says what is wrong with it
            model_class = resolve_name(paths[-1]) if paths else None
    bases = model_class.__mro__ if isinstance(model_class, type) else ()
    theirs = any(base.__module__.startswith("lightning.pytorch.") for base in bases)
    return "lightning.pytorch" if theirs else pl.__name__


def _model_paths(args: Any) -> Iterator[str]:
    """Class paths of the model, the one that counts last."""
    if not isinstance(args, Sequence):
        yield from _in_tree(args if isinstance(args, Mapping) else args.as_dict())
        return
    for word, following in zip(args, [*args[1:], ""], strict=True):
        key, equals, value = word.partition("=")
        value = value if equals else following
        if key in ("--model", "--model.class_path"):
            yield from _in_tree({"model": _loaded(value)})
        elif key in ("--config", "-c"):
            yield from _in_tree(_loaded(value))


def _loaded(value: str) -> Any:
    """What a file holds, or a string of YAML says."""
    try:
        return yaml.safe_load(Path(value).read_text() if Path(value).is_file() else value)
    except (OSError, ValueError, yaml.YAMLError):  # the parser says what is wrong with it
        return None


def _in_tree(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "model":
                path = value.get("class_path") if isinstance(value, Mapping) else value
                if isinstance(path, str):
                    yield path
            elif key in ("fit", "validate", "test", "predict"):
                yield from _in_tree(value)
