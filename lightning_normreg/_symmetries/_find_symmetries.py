"""Every scaling symmetry of a loss: what may be rescaled together, of any network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_normreg._symmetries._call import Loss, PrivateCall, check_callable
from lightning_normreg._symmetries._columns import LIVE, Column, chosen, columns_of, euler_products
from lightning_normreg._symmetries._layers import Layers, kind_of, kinds_of
from lightning_normreg._symmetries._losses import ProbeError
from lightning_normreg._symmetries._setup import Setup
from lightning_normreg._symmetries._spaces import null_space, readable_basis
from lightning_normreg._symmetries._symmetry import Symmetries, Symmetry

MORE = 12
"""Points beyond the number of columns."""


def find_symmetries(
    module: nn.Module,
    batch: Any = None,
    *,
    forward: Loss | None = None,
    layers: Literal["apart", "together"] = "apart",
    seed: int = 0,
) -> Symmetries:
    r"""Find all scaling symmetries of a loss: exponents c with :math:`L(a^{c_i} w_i) = L(w)` for every a > 0.

    Such exponents have :math:`\sum_i c_i\langle w_i, \partial L/\partial w_i\rangle = 0` at every point. So the Euler
    products of all tensors are taken at more generic points than there are tensors, with every eps negligible, on a
    private copy as in :func:`find_scale_invariance`; their null space is the answer. It is given in integers, and
    proved by multiplying by powers of two. Parts of a fused tensor (a dimension that is three times the other) have
    exponents of their own where these differ, and so have gains of the form 1 + γ.

    Args:
        module: In training mode. A LightningModule is asked for its own loss.
        batch: A few real samples.
        forward: ``forward(module, batch) -> loss`` for other modules.
        layers: ``"apart"``: all that there are. ``"together"``, for deep models: tensors whose names and shapes differ
            only by numbers are one kind, and a symmetry of kinds is parted into one for each layer where that holds
            alone. What is between one layer and the next of the same kind, as in a plain chain, is then not found.
        seed: Of everything that is drawn, at least 0.

    Returns:
        The symmetries. It costs a forward and a backward pass for each tensor, or each kind, and twelve more; a gain
        counts twice, and a fused tensor three times.

    Raises:
        ValueError: As :func:`find_scale_invariance`, and if nothing is trainable.
        ProbeError: If the loss cannot be computed on a private copy, or under manual optimization, where there are
            several losses.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.LayerNorm(5))
        >>> found = find_symmetries(model, torch.randn(8, 4), forward=lambda m, x: m(x).exp().mean())
        >>> for symmetry in found.basis:
        ...     print(symmetry)
        0.weight is scale-invariant.
        2.weight is scale-invariant.

    Reference:
        Van Laarhoven 2017, https://arxiv.org/abs/1706.05350, section 2, for one weight; the null space is derived here.
    """
    if layers not in ("apart", "together"):
        raise ValueError(f"`layers` must be 'apart' or 'together', got {layers!r}.")
    check_callable(module, batch, forward)
    call = PrivateCall(module, forward, batch, torch.float64)
    roles = Setup(module, call, seed=seed, draws=1)
    if not roles.roles:
        raise ValueError("`module` must have parameters that are trained, but all are frozen.")
    columns = [column for name in _in_order(roles) for column in columns_of(roles, name)]
    groups = kinds_of(columns, roles.shapes) if layers == "together" else [[place] for place in range(len(columns))]
    setup = Setup(module, call, seed=seed, draws=len(groups) + MORE)
    points = [euler_products(setup, index, columns) for index in range(setup.draws)]
    products, sizes = torch.stack([p for p, _ in points]), torch.stack([q for _, q in points]).mean(dim=0).sqrt()
    all_layers = Layers(columns, groups, {raw: clean for raw, (clean, _) in setup.names.items()}, products, sizes)
    kinds, products, sizes = chosen(
        [columns[group[0]] for group in groups],
        torch.stack([products[:, group].sum(dim=1) for group in groups], dim=1),
        torch.stack([sizes[group].norm() for group in groups]),
        call.dtype,
    )
    live = (sizes > LIVE * sizes.max()).tolist()
    space = null_space(products[:, live], sizes[live], call.dtype)
    kept = [kind for kind, flag in zip(kinds, live, strict=True) if flag]
    try:
        vectors = readable_basis(space.basis, [*map(kind_of, kept)])
    except ArithmeticError as error:
        raise ProbeError(f"The scaling symmetries could not be written in integers: {error}.") from error
    found = [
        (kind, exponents)
        for kind, vector in vectors
        for exponents in all_layers.parted({c: power for c, power in zip(kept, vector.tolist(), strict=True) if power})
    ]
    first = {column.parameter: place for place, column in reversed([*enumerate(columns)])}
    tensors = sorted((c for kind in kept for c in all_layers.members(kind)), key=lambda c: (first[c.parameter], c.part))
    dead = (c for kind, flag in zip(kinds, live, strict=True) if not flag for c in all_layers.members(kind))
    return Symmetries(
        basis=tuple(Symmetry(kind, {column.name: e for column, e in exponents.items()}) for kind, exponents in found),
        tensors=tuple(column.name for column in tensors),
        roles={column.name: setup.roles[column.parameter].role for column in tensors},
        inert=tuple(column.name for column in dead),
        smallest=space.smallest,
        largest=space.largest,
        certificate=_certificate(setup, [exponents for _, exponents in found]),
        passes=setup.draws,
    )


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in which order tensors are used first."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self.order: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves(args):
            if id(leaf) in self._names:
                self.order.setdefault(self._names[id(leaf)], len(self.order))
        return func(*args, **(kwargs or {}))


def _in_order(setup: Setup) -> list[str]:
    """Names of what is trained, in the order in which the loss uses them."""
    point, seed = setup.point(0)
    with _Uses({id(tensor): name for name, tensor in point.items()}) as uses:
        setup.call.run(point, lambda losses: None, seed=seed, shrink=setup.limits.shrink)
    return sorted(setup.roles, key=lambda name: uses.order.get(name, len(uses.order)))


def _certificate(setup: Setup, symmetries: Sequence[Mapping[Column, int]]) -> float:
    """Largest relative change of the loss when every symmetry acts at once, by powers of two.

    Raises:
        ProbeError: If it is more than roundoff.
    """
    point, seed = setup.certificate_point((), 0)
    generator = torch.Generator().manual_seed(seed)

    def loss_at(where: Mapping[str, Tensor]) -> float:
        leaves = {name: t.detach().requires_grad_(point[name].requires_grad) for name, t in where.items()}
        return setup.call.run(leaves, lambda losses: losses.values()[0], seed=seed, shrink=setup.limits.shrink)

    base, largest = loss_at(point), 0.0
    for _ in range(2 if symmetries else 0):
        powers: Counter[Column] = Counter()
        for exponents in symmetries:
            sign = int(torch.randint(2, (), generator=generator)) * 2 - 1
            powers.update({column: sign * power for column, power in exponents.items()})
        moved = {name: t.detach().clone() for name, t in point.items()}
        for column, power in powers.items():
            one = float(column.with_one)
            column.of(moved[column.parameter]).add_(one).mul_(2.0**power).sub_(one)
        largest = max(largest, abs(loss_at(moved) - base) / max(abs(base), 1e-30))
    if not largest <= setup.limits.certificate:
        raise ProbeError(
            f"The symmetries that were found must leave the loss alone, but it changed by {largest:.1g} of its size: a "
            "`training_step` that keeps state, or one that draws random numbers of its own, may be behind it."
        )
    return largest
