"""Steps that are not logged cost nothing but the projection."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_normreg import (
    EffectiveLRMonitor,
    NormProjection,
    RotationControl,
    WeightNormMonitor,
    find_scale_invariance,
)
from lightning_normreg.functional._device import as_on
from lightning_normreg.steps._step_hooks import StepDispatcher
from tests.harness import Net, loader, sgd, trainer


class Operations(TorchDispatchMode):
    """Counts tensor operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then go on."""
        self.counts[func.__name__] += 1
        found = func(*args, **(kwargs or {}))
        self.counts["float64"] += isinstance(found, torch.Tensor) and found.dtype == torch.float64
        return found


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Operations inside each pair of hooks, in the order of the steps."""
    counted: list[Counter[str]] = []
    enter, leave = StepDispatcher.enter, StepDispatcher.leave

    def counting_enter(self: StepDispatcher, *args: Any) -> Any:
        with Operations() as mode:
            found = enter(self, *args)
        counted.append(mode.counts)
        return found

    def counting_leave(self: StepDispatcher, *args: Any) -> None:
        with Operations() as mode:
            leave(self, *args)
        counted[-1] += mode.counts

    monkeypatch.setattr(StepDispatcher, "enter", counting_enter)
    monkeypatch.setattr(StepDispatcher, "leave", counting_leave)
    return counted


def test_monitors_do_nothing_on_other_steps(operations: list[Counter[str]]) -> None:
    """Not one tensor operation: no snapshot, no norm, no transfer."""
    run = trainer(WeightNormMonitor(), EffectiveLRMonitor(gradient=True), log_every_n_steps=3)
    run.fit(Net(sgd(momentum=0.9)), loader())
    assert [bool(c) for c in operations] == [True, False, True, False, False, True]


def test_projection_alone_on_other_steps(operations: list[Counter[str]]) -> None:
    """With monitors beside it, a step that is not logged has the operations of the projection by itself."""
    trainer(NormProjection(include=["conv1.weight"]), log_every_n_steps=3).fit(Net(sgd()), loader())
    alone = operations[1]
    operations.clear()
    together = [WeightNormMonitor(), EffectiveLRMonitor(), NormProjection(include=["conv1.weight"])]
    trainer(*together, log_every_n_steps=3).fit(Net(sgd()), loader())
    assert operations[1] == operations[3] == alone
    assert operations[2] != alone


def test_hooks_never_wait_for_a_device(operations: list[Counter[str]]) -> None:
    """Where reads are not free, no hook reads a value back, on logged steps either."""
    everything = [WeightNormMonitor(), EffectiveLRMonitor(gradient=True), NormProjection(include=["conv1.weight"])]
    with as_on("wide"):
        trainer(*everything).fit(Net(sgd()), loader())
    assert len(operations) == 6
    for counts in operations:
        assert counts["linalg_vector_norm.out"] > 0
        assert not {"_local_scalar_dense.default", "item.default", "nonzero.default"} & set(counts)


def test_histograms_add_nothing_to_the_hooks(operations: list[Counter[str]], tmp_path: Any) -> None:
    """The norms of the units are there anyway; they are read when the batch is over."""
    counted = []
    for histograms in (False, True):
        operations.clear()
        logger = TensorBoardLogger(tmp_path, str(histograms))
        trainer(WeightNormMonitor(histograms=histograms), logger=logger).fit(Net(sgd()), loader())
        counted.append(list(operations))
    assert counted[0] == counted[1]
    assert counted[0][0]


@pytest.mark.parametrize("options", [{}, {"per": "unit", "hold": "mean"}, {"angle": "equilibrium"}], ids=str)
def test_control_never_waits_for_a_device(options: Any, operations: list[Counter[str]]) -> None:
    """Nor does it need float64 there, with logged steps and without."""
    both = [RotationControl(**options), EffectiveLRMonitor()]
    with as_on("narrow"):
        trainer(*both, log_every_n_steps=2).fit(Net(torch.optim.AdamW), loader())
    assert len(operations) == 6
    for counts in operations:
        assert counts["lerp.Tensor"] > 0
        assert not {"_local_scalar_dense.default", "item.default", "nonzero.default"} & set(counts)
        assert not counts["float64"]


def test_one_copy_of_the_weights_serves_control_and_monitor(operations: list[Counter[str]]) -> None:
    """Each of the two weights is copied once for both, and not once for each."""
    verdict = find_scale_invariance(Net(sgd()), next(iter(loader())))
    copies = []
    for kinds in ((RotationControl,), (EffectiveLRMonitor,), (RotationControl, EffectiveLRMonitor)):
        operations.clear()
        trainer(*(kind(invariance=verdict, exclude=["head.weight"]) for kind in kinds)).fit(Net(sgd()), loader())
        copies.append(operations[1]["copy_.default"])
    control, monitor, both = copies
    assert both == control + monitor - 2


def test_control_has_few_operations_for_each_weight(operations: list[Counter[str]]) -> None:
    """What is done for each unit, and not for each entry, is done for all weights at once."""
    verdict = find_scale_invariance(Net(sgd()), next(iter(loader())))
    for include in (["conv1.weight"], ["conv1.weight", "up.weight"]):
        callback = RotationControl(invariance=verdict, include=include)
        trainer(callback, limit_train_batches=2, log_every_n_steps=100).fit(Net(sgd()), loader())
    one, two = (sum(operations[i].values()) for i in (1, 3))
    assert two < 1.6 * one


def test_one_transfer_per_logged_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of all layers is read back at once; on a device other than the CPU nothing else is read."""
    verdict = find_scale_invariance(Net(sgd()), next(iter(loader())))
    reads: list[int] = []
    tolist = torch.Tensor.tolist

    def counting(self: torch.Tensor) -> Any:
        reads.append(self.numel())
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counting)
    run = trainer(EffectiveLRMonitor(invariance=verdict, symmetries=None), log_every_n_steps=3)
    with as_on("wide"):
        run.fit(Net(sgd()), loader())
    # Three layers: effective rates of two kinds, rotation, relative update, the size of the gradient and of the units,
    # which their equilibrium depends on, and five signs of health.
    assert reads == [(6 + 5) * 3] * 3


@pytest.mark.parametrize("held", [True, False])
def test_notes_of_steps_do_not_pile_up(held: bool) -> None:
    """Learning rates are noted between logged steps only, also where nothing is predicted: of held weights."""
    monitor = EffectiveLRMonitor()
    projection = [NormProjection()] if held else []
    trainer(monitor, *projection, log_every_n_steps=2, max_epochs=4).fit(Net(sgd(weight_decay=0.1)), loader())
    notes = monitor.state_dict()["equilibria"]["steps"]
    assert {name: len(steps) for name, steps in notes.items()} == {"conv1.weight": 1, "up.weight": 1}
    trainer(monitor, log_every_n_steps=0).fit(Net(sgd(weight_decay=0.1)), loader())
    assert "equilibria" not in monitor.state_dict()


@pytest.mark.pitfall(6)
def test_hooks_are_gone_after_the_run() -> None:
    """After fit, and after an exception, the optimizer has no hook of ours."""

    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise RuntimeError("no more")
            return super().training_step(batch, batch_idx)

    run = trainer(EffectiveLRMonitor())
    run.fit(Net(sgd()), loader())
    assert not run.optimizers[0]._optimizer_step_post_hooks
    run = trainer(EffectiveLRMonitor())
    optimizers = []
    net = Fails(lambda groups: optimizers.append(torch.optim.SGD(groups)) or optimizers[0])
    with pytest.raises(RuntimeError, match="no more"):
        run.fit(net, loader())
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert not optimizers[0]._optimizer_step_post_hooks
