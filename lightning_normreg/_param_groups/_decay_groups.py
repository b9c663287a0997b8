"""Parameter groups that decay each role as it should be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_normreg._param_groups._regroup import load_by_name
from lightning_normreg._symmetries import Symmetries, audit_decay
from lightning_normreg._weights import ROLES, clean_name, find_flat_pieces, is_vector, match, named_roles, whole_shape


def decay_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    gamma: float | None = 0.0,
    beta: float | None = 0.0,
    bias: float | None = 0.0,
    embedding: float | None = None,
    other: float | Literal["auto"] | None = "auto",
    overrides: Mapping[str, float | None] | None = None,
    symmetries: Symmetries | Mapping[str, Any] | str | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a module into one optimizer group per role and decay.

    Roles come from :func:`parameter_roles`. What was decided, what is frozen and left out, and which bare parameters
    are decayed and which are not is said once, through Lightning's logger.

    Args:
        module: The module to train.
        weight_decay: Decay of the weights, at least 0, in the optimizer's own unit. ``None`` for a role means this.
        gamma: Decay of the gains of normalizations. The paper did not decay γ and β, and saw no difference when it did.
        beta: Decay of the shifts of normalizations.
        bias: Decay of all other biases.
        embedding: Decay of embedding tables.
        other: Decay of bare parameters (class token, position embedding, logit scale, LayerScale). ``"auto"``: 0 with
            at most one dimension longer than 1, else ``weight_decay``; which are not decayed is said, as a vector may
            be a matrix that its layer unfolds. A model's ``no_weight_decay()`` goes first.
        overrides: Decay by glob over clean names, before every other rule. A glob that matches nothing, and two globs
            that give one parameter different decays, are errors.
        symmetries: All scaling symmetries (:func:`find_symmetries`), or a file of :meth:`Symmetries.save`: then it is
            said what this decay does to the function, at one learning rate for all, and a warning names tensors that
            are scale-invariant together and decayed unequally, with ``overrides`` that decay them equally.

    Returns:
        Groups for any ``torch.optim`` optimizer that takes groups, each with ``params``, a unique ``name``,
        ``weight_decay`` and ``param_names``. Empty groups are left out, tied parameters appear once. torch wants
        ``param_names`` in all groups of an optimizer or in none: one that is added later needs them, too.

    Raises:
        TypeError: If ``module`` is no ``torch.nn.Module``.
        ValueError: If a decay is negative or no number, nothing is trainable, a lazy module is not materialized, or an
            override matches nothing, or the symmetries are those of another model.
        FileNotFoundError: If there is no file of symmetries.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> for group in decay_groups(model, 0.05):
        ...     print(group["name"], group["weight_decay"], group["param_names"])
        weight 0.05 ['0.weight', '2.weight']
        gamma 0.0 ['1.weight']
        beta 0.0 ['1.bias']
        bias 0.0 ['0.bias', '2.bias']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            "`module` must be a torch.nn.Module, and DecayGroupsMixin mixed into a torch.nn.Module, got "
            f"{type(module).__name__}."
        )
    by_role = {"gamma": gamma, "beta": beta, "bias": bias, "embedding": embedding, "other": other}
    _check_decay("weight_decay", weight_decay)
    for argument, decay in by_role.items():
        if not (decay is None or (argument == "other" and decay == "auto")):
            _check_decay(argument, decay)
    trainer = getattr(module, "_trainer", None)  # which has wrapped the module, where it is FSDP's first version
    find_flat_pieces(getattr(trainer, "model", None) or module)
    found = named_roles(module)
    trainable = [(name, p, role) for name, p, role in found if p.requires_grad]
    if not trainable:
        state = "has no parameters" if not found else "has only frozen parameters"
        raise ValueError(f"`module` must have something to train, but {type(module).__name__} {state}.")
    wanted = {glob: weight_decay if decay is None else decay for glob, decay in (overrides or {}).items()}
    forced = _forced(module, {name: role.aliases for name, _, role in found}, wanted)

    groups: dict[tuple[str, float], dict[str, Any]] = {}
    bare: list[str] = []
    free: list[str] = []
    for name, parameter, role in sorted(trainable, key=lambda entry: ROLES.index(entry[2].role)):
        base = by_role.get(role.role)
        usual = weight_decay if base is None or base == "auto" else base
        is_free = base == "auto" and is_vector(parameter) and name not in forced
        decay = float(forced.get(name, 0.0 if is_free else usual))
        label = role.role if decay == usual else f"{role.role}_wd_{repr(decay).removesuffix('.0')}"
        group = groups.setdefault(
            (label, decay), {"params": [], "name": label, "weight_decay": decay, "param_names": []}
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
        if role.role == "other" and (decay or is_free):
            (bare if decay else free).append(f"{name} ({'×'.join(map(str, whole_shape(parameter))) or 'scalar'})")
    _say(list(groups.values()), bare, free, [name for name, p, _ in found if not p.requires_grad])
    if symmetries is not None:
        known = Symmetries.load(symmetries)
        known.check_names(name for name, _, _ in found)
        _say_what_it_does(known, {n: g["weight_decay"] for g in groups.values() for n in g["param_names"]})
    return list(groups.values())


class DecayGroupsMixin:
    """Gives a module the method :meth:`decay_groups`, for use in ``configure_optimizers``.

    A LightningModule with it can also resume a checkpoint that was written before it had these groups: the optimizer's
    state is mapped by name, and each group decays as configured now. (Where ``on_load_checkpoint`` or ``on_fit_start``
    is overridden, call ``super()``.)

    Examples:
        >>> class Model(DecayGroupsMixin, nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 2)
        >>> [group["name"] for group in Model().decay_groups(0.05)]
        ['weight', 'bias']
    """

    decay_groups = decay_groups

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the states of schedulers, which are restored after the optimizers'."""
        vars(self)["_resumed_schedulers"] = checkpoint.get("lr_schedulers", ())
        _call_next(super(), "on_load_checkpoint", checkpoint)

    def on_fit_start(self) -> None:
        """Let the optimizers load the state of other groups."""
        states = vars(self).pop("_resumed_schedulers", None)
        if states is not None and isinstance(self, nn.Module):
            trainer: Any = self.trainer
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            load_by_name(trainer.optimizers, self, list(zip(schedulers, states, strict=False)))
        _call_next(super(), "on_fit_start")


def _call_next(parents: Any, hook: str, *arguments: Any) -> None:
    method = getattr(parents, hook, None)  # Lightning has these hooks, a plain nn.Module has not
    if method is not None:
        method(*arguments)


def _check_decay(argument: str, decay: object) -> None:
    if isinstance(decay, bool) or not isinstance(decay, Real) or not 0 <= float(decay) < math.inf:
        raise ValueError(f"`{argument}` must be a decay of at least 0, got {decay!r}. Use 0.0 for none.")


def _forced(
    module: nn.Module, names: Mapping[str, tuple[str, ...]], overrides: Mapping[str, float]
) -> dict[str, float]:
    """Decays that go before the roles: the model's own ``no_weight_decay()``, then the overrides."""
    forced = dict.fromkeys(_no_weight_decay(module, names), 0.0)
    source: dict[str, str] = {}
    for glob, decay in overrides.items():
        _check_decay(f"overrides[{glob!r}]", decay)
        for name in match(glob, names, "overrides"):
            if name in source and forced[name] != decay:
                raise ValueError(
                    f"`overrides` must give each parameter one decay, but {source[name]!r} and {glob!r} "
                    f"give {name!r} {forced[name]} and {decay}. Make one glob narrower."
                )
            forced[name], source[name] = decay, glob
    return forced


def _no_weight_decay(module: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Parameters that a model asks not to decay, by the method that timm's models have."""
    for prefix, owner in module.named_modules():
        method = getattr(owner, "no_weight_decay", None)
        if callable(method):
            start = clean_name(f"{prefix}.") if prefix else ""
            globs = [start + str(glob) for glob in method()]
            for name, aliases in names.items():
                if any(fnmatchcase(n, glob) for n in (name, *aliases) for glob in globs):
                    yield name


def _say(groups: list[dict[str, Any]], bare: list[str], free: list[str], frozen: list[str]) -> None:
    sizes = ", ".join(f"{g['name']} {g['weight_decay']:g} ({len(g['params'])} parameters)" for g in groups)
    rank_zero_info(f"Decay groups: {sizes}.")
    if bare:
        rank_zero_info(
            f"Decayed although neither weight nor embedding: {', '.join(bare)}. "
            "Free one by overrides={'<name>': 0.0}, all by other=0.0."
        )
    if free:
        rank_zero_info(
            f"Not decayed, as bare vectors: {', '.join(free)}. Where a layer unfolds one into a matrix, give it a "
            "decay by overrides={'<name>': …}."
        )
    if frozen:
        rank_zero_info(f"Frozen, so in no decay group: {', '.join(frozen)}.")


def _say_what_it_does(symmetries: Symmetries, decays: Mapping[str, float]) -> None:
    """With one learning rate for all."""
    found = audit_decay(symmetries, decays, dict.fromkeys(decays, 1.0))
    for sentence in found.sentences:
        rank_zero_info(sentence)
    for sentence, members in found.unequal.items():
        rank_zero_warn(f"{sentence} Give all of it one decay by overrides={_one_decay(members, decays)!r}.")


def _one_decay(members: tuple[str, ...], decays: Mapping[str, float]) -> dict[str, float]:
    """Overrides that give all members the largest decay among them, or none where one of them is frozen."""
    decay = max(map(decays.__getitem__, members)) if decays.keys() >= {*members} else 0.0
    others = {name for name in members if decays.get(name, decay) != decay}
    globs = {name: re.sub(r"\d+", "*", name) for name in members if name in others}
    return {
        glob if all(name in others for name in decays if fnmatchcase(name, glob)) else name: decay
        for name, glob in globs.items()
    }
