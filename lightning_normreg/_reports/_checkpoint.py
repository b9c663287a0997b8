"""A checkpoint on disk, read without running anything that is in it."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_normreg._symmetries import Symmetries, load_verdict
from lightning_normreg._weights import ScaleInvariance, clean_name

T = TypeVar("T")
_TRAINED = "current_model_state"  # where Lightning's averaging has put it, with the averages in its usual place
_WEIGHTS = (_TRAINED, "state_dict", "model_state_dict", "model")
_OPTIMIZERS = ("optimizer_states", "optimizer_state_dict", "optimizer")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class CheckpointError(ValueError):
    """A file that cannot be read, or is no checkpoint; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of weights and optimizers."""

    about: str  # who wrote it and when, in words
    state_dict: dict[str, Any]  # the module's state as it is in the file
    tensors: dict[str, Tensor]  # clean name → what may be a parameter, in the order of the file; tied ones once
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)  # clean name → other names of a tied tensor
    left_out: tuple[str, ...] = ()  # names of what is in the state but cannot be a parameter
    optimizers: tuple[dict[str, Any], ...] = ()  # the state of each
    verdict: dict[str, ScaleInvariance] | None = None  # where a callback of this package has noted it
    symmetries: Symmetries | None = None  # where NormSummary has


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of Lightning, a mapping with ``model_state_dict`` and the like, or a plain state dict.

    Only tensors and plain types are read (``weights_only=True``): a file from elsewhere runs no code here. A
    :class:`CheckpointError` says that there is no such file, or that it is empty or damaged, holds other types, or no
    weights.
    """
    path = Path(path)
    content = _load(path)
    state = _state_dict(path, content)
    tensors, aliases, left_out = _split(state)
    optimizers = () if state is content else tuple(_optimizers(content))
    return Checkpoint(
        _about(content), state, tensors, aliases, left_out, optimizers, _verdict(content), _symmetries(content)
    )


def _load(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise CheckpointError(
            f"{str(path)!r} is a folder: the checkpoint of a sharded run. Put it together in one file first, for "
            "example by `python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )
    if not path.exists():
        raise CheckpointError(f"there is no file {str(path)!r}.")
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise CheckpointError(f"{str(path)!r} is empty: the run that wrote it did not get to the end.")
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        damaged = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # looks at the checksums, which torch writes and does not read
    except Exception as error:  # whatever a damaged file leads to
        raise CheckpointError(_why(path, error)) from error
    if damaged is not None:
        raise CheckpointError(
            f"{str(path)!r} is damaged: the checksum of {damaged!r} in it is wrong. Use another copy. (If it was saved "
            "under set_crc32_options(False), save it again without.)"
        )
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, no checkpoint and no state dict.")
    return content


def _why(path: Path, error: Exception) -> str:
    names = set(re.findall(r"GLOBAL (\S+)", str(error)))
    with suppress(Exception):  # it reads intact files of the newer format only
        names.update(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    if not names:
        first = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        return f"{str(path)!r} is no checkpoint, or a damaged one ({first}). Nothing of it was used."
    return (
        f"{str(path)!r} holds what is neither tensor nor plain type: {', '.join(sorted(names))}. Making it could run "
        "code of whoever wrote the file, so nothing was read. If you trust the file, save what is needed as plain "
        "types: c = torch.load(path, weights_only=False); torch.save({k: c[k] for k in ('state_dict', "
        "'optimizer_states')}, 'plain.ckpt')."
    )


def _state_dict(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    for key in _WEIGHTS:
        if isinstance(content.get(key), Mapping) and all(isinstance(name, str) for name in content[key]):
            return dict(content[key])
    if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return content  # type: ignore[return-value]
    keys = ", ".join(map(repr, list(content)[:6])) or "none"
    raise CheckpointError(
        f"{str(path)!r} has no weights: it must be a state dict, or have one under "
        f"{' or '.join(map(repr, _WEIGHTS[1:]))}, but its keys are {keys}."
    )


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]], tuple[str, ...]]:
    """What may be parameters, the other names of tied ones, and the names of the rest."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    left_out = []
    seen: dict[tuple[Any, ...], str] = {}
    for raw, value in state.items():
        name = clean_name(raw)
        is_plain = isinstance(value, Tensor) and type(value.data) is Tensor and value.layout == torch.strided
        has_numbers = is_plain and (value.is_floating_point() or value.is_complex())
        if not has_numbers or name.rpartition(".")[2] in _BUFFERS:
            left_out.append(name)
            continue
        # torch keeps in the file which tensors share their memory.
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in seen:
            aliases[seen[place]] = (*aliases.get(seen[place], ()), name)
        else:
            seen[place] = name
            tensors[name] = value
    return tensors, aliases, tuple(left_out)


def _optimizers(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key in _OPTIMIZERS:
        if content.get(key):
            found = content[key] if isinstance(content[key], list) else [content[key]]
            for number, state in enumerate(found):
                if not _is_optimizer_state(state):
                    raise CheckpointError(
                        f"{key}[{number}] is no state of a torch optimizer: it must have 'state' and 'param_groups'. "
                        "(DeepSpeed keeps its own.) Save the weights alone to see their norms."
                    )
                yield state
            return


def _is_optimizer_state(state: object) -> bool:
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return False
    groups = state.get("param_groups")
    return isinstance(groups, list) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups
    )


def _verdict(content: Mapping[str, Any]) -> dict[str, ScaleInvariance] | None:
    return next(_noted(content, "invariance", load_verdict), None)


def _symmetries(content: Mapping[str, Any]) -> Symmetries | None:
    return next(_noted(content, "symmetries", Symmetries.load), None)


def _noted(content: Mapping[str, Any], key: str, load: Callable[[Mapping[str, Any]], T]) -> Iterator[T]:
    """What callbacks of this package have noted."""
    callbacks = content.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            with suppress(ValueError):  # another callback's, or of another version
                if found := load(state[key]):
                    yield found


def _about(content: Mapping[str, Any]) -> str:
    version = content.get("pytorch-lightning_version")
    words = [f"written by Lightning {version}"] if isinstance(version, str) else []
    for key, word in (("epoch", "epoch"), ("global_step", "step")):
        if isinstance(content.get(key), int):
            words.append(f"{word} {content[key]}")
    if _TRAINED in content:
        words.append("the weights in training, not their averages")
    return ", ".join(words) or "a state dict"
