"""When did an optimizer really update its parameters? One dispatcher owns the torch hooks that know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_normreg._weights import Watched, is_flat
from lightning_normreg.steps._record import StepRecord
from lightning_normreg.steps._subscriber import StepSubscriber

T = TypeVar("T")

_INNER = ("optimizer", "_optimizer", "base_optimizer", "base")


class StepDispatcher:
    """Owns the step hooks of a list of optimizers and passes real updates on, phase by phase.

    The post-hook of a torch optimizer is the only event that means "parameters were updated" under accumulation,
    gradient scaling, manual optimization and closures alike. Four traps remain, all handled here: a subclass whose
    ``step`` calls ``super().step()`` fires its hooks twice; a wrapper may let the optimizer inside it step without a
    ``step`` of its own (the second step of SAM), or within it; a step without any gradient updates nothing; a fused
    optimizer under a gradient scaler skips inside its kernel, which only ``found_inf`` tells. When gradients are
    complete only the loop knows, which calls :meth:`gradients_ready`.

    Between the two hooks runs the closure, in Lightning the whole training step. The optimizer gets it wrapped, so that
    groups are changed only when it has returned. An exception in the optimizer's own arithmetic no hook tells: then
    they are put back at the next step, by :meth:`attach`, or by :meth:`remove`.
    """

    def __init__(self) -> None:
        self.record = StepRecord()
        self._subscribers: list[StepSubscriber] = []
        self._hooked: list[tuple[int, Optimizer]] = []
        self._handles: list[RemovableHandle] = []
        self._depth: dict[int, int] = {}
        self._ready: set[int] = set()
        self._by_hand: set[int] = set()
        self._updates: dict[int, int] = {}
        self._skipped: dict[int, Tensor] = {}
        self._changed: dict[int, Optimizer] = {}

    def subscribe(self, subscriber: StepSubscriber) -> None:
        """Add a subscriber; within a phase they are called in the order of subscription."""
        subscriber.record = self.record
        self._subscribers.append(subscriber)
        self._subscribers.sort(key=lambda s: s.phase)

    def unsubscribe(self, subscriber: StepSubscriber) -> None:
        """Tell a subscriber nothing any more."""
        self._subscribers.remove(subscriber)

    def attach(self, optimizers: Sequence[object]) -> None:
        """Put hooks on these optimizers and take them off all others. Cheap where nothing has changed.

        Of all hooks on an optimizer these come last before the step, and first after it.
        """
        self._depth.clear()  # a step that raised has left a pre-hook without its post-hook
        self._ready.clear()  # a gradient scaler that skips calls no optimizer
        self._restore_all()
        known = [torch_optimizer(optimizer) for optimizer in optimizers]
        hooked = [(i, each) for i, optimizer in enumerate(known) for each in _with_inner(optimizer, known)]
        if [(i, id(each)) for i, each in hooked] != [(i, id(each)) for i, each in self._hooked]:
            self.remove()
            self._hooked = hooked
            for index, optimizer in hooked:
                self._handles.append(optimizer.register_step_pre_hook(_Hook(self.enter, index, known[index])))
                self._handles.append(optimizer.register_step_post_hook(_Hook(self.leave, index, known[index])))
        for number, handle in enumerate(self._handles):
            hooks: Any = handle.hooks_dict_ref()
            if hooks is not None:
                hooks.move_to_end(handle.id, last=number % 2 == 0)

    def remove(self) -> None:
        """Take all hooks off, so that an optimizer that outlives the training is as it was."""
        self._restore_all()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked = []

    @property
    def has_seen_updates(self) -> bool:
        """Whether any optimizer has updated its parameters."""
        return bool(self._updates)

    def has_updated(self, index: int) -> bool:
        """Whether an optimizer has stepped, by all that is known without reading the device."""
        return index in self._updates

    def updates(self, index: int) -> int:
        """How often an optimizer has really updated its parameters; reads the device under a gradient scaler."""
        skipped = self._skipped.get(index)
        return self._updates.get(index, 0) - (0 if skipped is None else int(skipped.item()))

    @torch.no_grad()
    def enter(self, index: int, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """The pre-hook: what ``step`` was given, the optimizer itself first, and what it is to have instead."""
        self._depth[index] = self._depth.get(index, 0) + 1
        if self._depth[index] > 1:
            return None
        self._restore(index)
        self.record.begin()
        for subscriber in self._subscribers:
            subscriber.before_step(index, optimizer)
        self.record.prepare()
        if index in self._by_hand:
            self.gradients_ready(index, optimizer, None)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._change(index, optimizer)
            return None
        wrapped = partial(self._evaluate, index, optimizer, closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": wrapped})

    def _evaluate(
        self, index: int, optimizer: Optimizer, closure: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self._restore(index)
        try:
            loss = closure(*args, **kwargs)
        except BaseException:
            self._depth.pop(index, None)  # no post-hook will follow
            raise
        self._change(index, optimizer)
        return loss

    @torch.no_grad()
    def _change(self, index: int, optimizer: Optimizer) -> None:
        self._changed[index] = optimizer
        for subscriber in self._subscribers:
            subscriber.change_groups(index, optimizer)

    @torch.no_grad()
    def _restore(self, index: int) -> None:
        optimizer = self._changed.pop(index, None)
        if optimizer is not None:
            for subscriber in reversed(self._subscribers):
                subscriber.restore_groups(index, optimizer)

    def _restore_all(self) -> None:
        for index in list(self._changed):
            self._restore(index)

    @torch.no_grad()
    def gradients_ready(self, index: int, optimizer: Optimizer, scale: float | None = 1.0) -> None:
        """Say that an optimizer's gradients are complete and not clipped yet; where nobody does, the pre-hook will.

        Args:
            index: Index of the optimizer.
            optimizer: The optimizer.
            scale: Loss scale that is still in the gradients.
        """
        if index in self._ready and self._depth.get(index):
            return  # a closure that is evaluated again (LBFGS) is at other weights by now
        self._ready.add(index)
        for subscriber in self._subscribers:
            subscriber.gradients_ready(index, optimizer, scale)

    @torch.no_grad()
    def leave(self, index: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The post-hook."""
        self._depth[index] = self._depth.get(index, 1) - 1
        if self._depth[index] > 0:
            return
        if any(has_gradient(p) for g in optimizer.param_groups for p in g["params"]):
            self._tell(index, optimizer)
        self._restore(index)

    def _tell(self, index: int, optimizer: Optimizer) -> None:
        if index not in self._ready:
            self._by_hand.add(index)
        self._ready.discard(index)
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf.detach().reshape(()).clone() if isinstance(found_inf, Tensor) else None
        self._updates[index] = self._updates.get(index, 0) + 1
        if skipped is not None:
            self._skipped[index] = self._skipped.get(index, torch.zeros_like(skipped)) + skipped
        for subscriber in self._subscribers:
            subscriber.after_step(index, optimizer, skipped)


class _Hook:
    """A hook that ``torch.compile`` leaves alone, instead of tracing it into the optimizer's graph.

    It tells of the optimizer that is known, also where one inside of it steps.
    """

    def __init__(self, act: Callable[[int, Optimizer, Any, Any], Any], index: int, known: Optimizer) -> None:
        self._act = act
        self._index = index
        self._known = known

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return self._act(self._index, self._known, args, kwargs)


def torch_optimizer(optimizer: object) -> Optimizer:
    """The torch optimizer itself, or the one inside a wrapper that never initialized its own hooks.

    Raises:
        TypeError: If there is none.
        NotImplementedError: If it is DeepSpeed's, whose torch optimizer has flat partitions instead of weights.
    """
    if type(optimizer).__module__.partition(".")[0] == "deepspeed":
        raise NotImplementedError(
            f"`optimizer` must update the model's own weights, but {type(optimizer).__name__} updates flat partitions "
            "of them. Use FSDPStrategy or ModelParallelStrategy instead of DeepSpeed."
        )
    inner: object = optimizer
    while not (isinstance(inner, Optimizer) and "_optimizer_step_post_hooks" in vars(inner)):
        attributes = getattr(inner, "__dict__", {})
        inner = next((attributes[name] for name in _INNER if attributes.get(name) is not None), None)
        if inner is None:
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer or wrap one, got {type(optimizer).__name__}, whose steps "
                "cannot be seen. Derive it from torch.optim.Optimizer and call super().__init__()."
            )
    return inner


def _with_inner(optimizer: Optimizer, known: Sequence[Optimizer]) -> list[Optimizer]:
    """An optimizer, and those inside it that share its parameters and are not known themselves."""
    found = [optimizer]
    for outer in found:  # grows
        for inner in vars(outer).values():
            if not isinstance(inner, Optimizer) or "_optimizer_step_post_hooks" not in vars(inner):
                continue
            if not any(inner is each for each in (*found, *known)):
                mine = {p for group in outer.param_groups for p in group["params"]}
                if any(p in mine for group in inner.param_groups for p in group["params"]):
                    found.append(inner)
    return found


def of_mine(
    optimizers: Iterable[Optimizer], mine: Mapping[Parameter, Sequence[T]], *, ready: bool = False
) -> list[tuple[T, dict[str, Any], Optimizer]]:
    """What of mine some optimizers have, by their group lists as they stand now, each with its group and optimizer.

    Args:
        optimizers: The optimizers.
        mine: What each parameter belongs to; a set, to which several do, comes with the first of them.
        ready: Only what the coming or present step moves; before a closure has run, gradients may not be there yet.
    """
    found: dict[tuple[int, int], tuple[T, dict[str, Any], Optimizer]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in mine and (not ready or has_gradient(p)):
                    for one in mine[p]:
                        found.setdefault((id(optimizer), id(one)), (one, group, optimizer))
    return [*found.values()]


def by_parameter(watched: Iterable[Watched]) -> dict[Parameter, list[Watched]]:
    """What each parameter belongs to, for :func:`of_mine`."""
    found: dict[Parameter, list[Watched]] = {}
    for w in watched:
        for one in w.members or (w,):
            found.setdefault(one.parameter, []).append(w)
    return found


def has_gradient(parameter: Tensor) -> bool:
    """Whether an optimizer's step will move a parameter, as all processes see it.

    An empty piece of FSDP's first version has no gradient although the others have.
    """
    return parameter.grad is not None or is_flat(parameter)
