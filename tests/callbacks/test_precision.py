"""Every precision: the numbers are those of the weights as they are stored, and norms are held as well as possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_normreg import CorrectedDecay, EffectiveLRMonitor, NormProjection, WeightNormMonitor
from lightning_normreg.functional._device import as_on
from lightning_normreg.steps._step_hooks import StepDispatcher
from tests.callbacks.test_logged_values import WEIGHTS, expected, units
from tests.harness import Net, RecordingLogger, loader, trainer


def precision(name: str) -> tuple[dict[str, Any], torch.dtype]:
    """Options of a Trainer, and the type of the data. Float16 on a CPU needs a scaler given by hand."""
    if name == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}, torch.float32
    data = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    return {"precision": name}, data.get(name, torch.float32)


PRECISIONS = ("bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("make, exponent", [(torch.optim.SGD, 2), (torch.optim.AdamW, 1)], ids=["sgd", "adamw"])
def test_logged_values_are_those_of_the_stored_weights(name: str, make: Any, exponent: int) -> None:
    """Recomputed in float64 from the weights before and after each step, of whatever type: 1e-5, and 1e-10 in float64.

    With bfloat16 weights that holds only if nothing is summed in bfloat16, which keeps 3 digits.
    """
    options, dtype = precision(name)
    torch.manual_seed(0)
    # Steps of 1 %, so that bfloat16, whose neighbours are 0.4 to 0.8 % apart, moves at all.
    net = Net(
        lambda groups: make(groups, eps=1e-4) if exponent == 1 else make([g | {"lr": 0.5} for g in groups]), False
    )
    run = trainer(WeightNormMonitor(), EffectiveLRMonitor(), max_epochs=2, **options)
    run.fit(net, loader(dtype=dtype))
    assert isinstance(run.logger, RecordingLogger)
    logged: dict[int, dict[str, float]] = {}
    for step, row in run.logger.rows:
        logged.setdefault(step, {}).update(row)
    assert len(net.steps) == 12
    tolerance = 1e-10 if name == "64-true" else 1e-5
    for step in net.steps:
        for weight in WEIGHTS:
            for key, value in expected(step, weight, exponent).items():
                assert logged[step.batch][f"weights/{key}/{weight}"] == pytest.approx(value, rel=tolerance), (
                    step.batch,
                    key,
                )


@pytest.mark.parametrize("name", PRECISIONS)
def test_norms_are_held_as_well_as_the_type_can(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """To the rounding of the entries: ε/2 of a narrow type; where that is much, it is said once, with the type."""
    options, dtype = precision(name)
    torch.manual_seed(0)
    net = Net(lambda groups: torch.optim.SGD(groups, lr=0.5), False)
    with caplog.at_level("INFO"):
        trainer(NormProjection(), max_epochs=2, **options).fit(net, loader(dtype=dtype))  # warnings would be errors
    stored = net.conv1.weight.dtype
    held = {torch.float64: 1e-14, torch.float32: 1e-6}.get(stored, torch.finfo(stored).eps / 2)
    for step in net.steps:
        for weight in ("conv1.weight", "up.weight"):
            norms = np.sqrt((units(weight, step.after[weight]) ** 2).sum(1))
            assert abs(norms - 1).max() <= held
    said = [r.getMessage() for r in caplog.records if "norms are held to that" in r.getMessage()]
    assert len(said) == (stored in (torch.bfloat16, torch.float16))
    assert all(str(stored) in text and "precision='bf16-mixed'" in text for text in said)


class Accelerator(TorchDispatchMode):
    """Refuses what an accelerator cannot do (float64) or must not do in a hook (hand a number to the host)."""

    READS = frozenset({"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"})
    SUMS = ("sum", "linalg_vector_norm", "mean", "dot", "norm")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check, then go on."""
        name = func.__name__.partition(".")[0]
        assert name not in self.READS, f"{func} waits for the device"
        inputs = [a for a in args if isinstance(a, torch.Tensor)]
        if name in self.SUMS and (kwargs or {}).get("dtype") != torch.float32:
            assert all(t.dtype not in (torch.bfloat16, torch.float16) for t in inputs), f"{func} adds up in {inputs}"
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in (*inputs, result) if isinstance(t, torch.Tensor)]
        # Counts of steps that an optimizer keeps in the host's memory are 0-dimensional.
        assert all(t.dtype != torch.float64 or t.ndim == 0 for t in outputs), f"{func} computes in float64"
        return result


MUON = {"lr": 0.02, "weight_decay": 0.1}


class WithMuon(Net):
    """Two optimizers would need a manual loop; this one has its only matrix in Muon."""

    def configure_optimizers(self) -> Any:
        """The head."""
        return torch.optim.Muon([self.head.weight], **MUON)


@pytest.mark.parametrize(
    "optimizer, given",
    [
        (torch.optim.SGD, True),
        (torch.optim.Adam, True),
        (torch.optim.AdamW, False),
        (torch.optim.AdamW, True),
        (torch.optim.RMSprop, True),
        (torch.optim.NAdam, True),
        (torch.optim.Muon, True),
    ],
)
@pytest.mark.parametrize("name", ["32-true", "bf16-true"])
def test_hooks_could_run_on_any_accelerator(
    optimizer: Any, given: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No float64, no number read back, no sum in a narrow type, in any hook around the steps of all callbacks at once.

    The observer and the watchdog look at every step here.
    """
    wrapped = ((StepDispatcher, "enter"), (StepDispatcher, "leave"), (EffectiveLRMonitor, "on_before_optimizer_step"))
    entered: list[str] = []
    for owner, hook in wrapped:
        plain = getattr(owner, hook)

        def checked(self: Any, *args: Any, plain: Any = plain, hook: str = hook) -> Any:
            entered.append(hook)
            with Accelerator():
                return plain(self, *args)

        monkeypatch.setattr(owner, hook, checked)
    monkeypatch.setattr("lightning_normreg.steps._observer.InvarianceWatchdog.is_due", lambda self, step: True)
    if not given:
        monkeypatch.setattr("lightning_normreg.callbacks._knowledge.probe", lambda *args, **options: {})
        monkeypatch.setattr("lightning_normreg.steps._observer.GradientObserver.STEPS", (0, 1, 2, 3))
    options, dtype = precision(name)
    everything = {"gradient": True, "scale_exponent": True, "momentum_gain": True}
    monitors = [WeightNormMonitor(), EffectiveLRMonitor(**everything, on_unhealthy="ignore")]
    muon = optimizer is torch.optim.Muon
    include = ["head.weight"] if muon else ["conv1.weight", "up.weight"]
    projection = NormProjection(include=include, unit="neuron", on_not_invariant="allow")
    corrected = [] if muon or not given or optimizer is torch.optim.NAdam else [CorrectedDecay()]
    torch.manual_seed(0)
    net = WithMuon(optimizer, False) if muon else Net(lambda groups: optimizer(groups, weight_decay=0.1), False)
    run = trainer(*monitors, projection, *corrected, **options)
    with as_on("narrow"):
        run.fit(net, loader(dtype=dtype))
    assert [entered.count(hook) for _, hook in wrapped] == [6, 6, 6]
    assert "weights/rotation/head.weight" in run.callback_metrics
    assert run.callback_metrics["weights/rotation/head.weight"].dtype == torch.float32


def test_the_check_can_fail() -> None:
    """A read, a float64 tensor and a sum in bfloat16 are refused."""
    with Accelerator(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(()).item()
    with Accelerator(), pytest.raises(AssertionError, match="computes in float64"):
        torch.ones(2).double()
    with Accelerator(), pytest.raises(AssertionError, match="adds up in"):
        torch.ones(2, dtype=torch.bfloat16).sum()
