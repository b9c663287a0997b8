"""Bad cases are told in words that say what to do."""

from __future__ import annotations

import threading

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm

from lightning_normreg._symmetries import ProbeError, find_scale_invariance
from lightning_normreg._weights import summarize


class Module(LightningModule):
    """A LightningModule whose training_step returns what it is told to."""

    def __init__(self, result="loss") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        self.result = result

    def training_step(self, batch):
        """One of several results."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        results = {
            "loss": loss,
            "dict": {"loss": loss, "other": 1},
            "None": None,
            "empty": {"other": 1},
            "vector": loss.expand(2),
            "detached": loss.detach(),
            "nan": loss * float("nan"),
            "number": 1.0,
        }
        return results[self.result]


BATCH = (torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)


def loss(module, batch):
    """Cross entropy."""
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("result", ["loss", "dict"])
def test_training_step_may_return_the_loss_or_a_mapping_with_it(result):
    """Both forms that Lightning knows work."""
    assert find_scale_invariance(Module(result), BATCH)["net.0.weight"].kind == "neuron"


def test_the_index_of_the_batch_may_have_any_name():
    """Lightning passes it by position; a step without one is called without."""

    class Underscore(Module):
        def training_step(self, batch, _):
            assert _ == 0
            return super().training_step(batch)

    class Variadic(Module):
        def training_step(self, *args):
            assert args[1:] == (0,)
            return super().training_step(args[0])

    for module in (Underscore(), Variadic()):
        assert find_scale_invariance(module, BATCH)["net.0.weight"].kind == "neuron"


@pytest.mark.parametrize(
    "result, message",
    [
        ("None", "must return the loss, .* but it returned None. Pass a batch for which it does, or `forward`"),
        ("empty", "but it returned a dict without 'loss'"),
        ("vector", r"but it returned a tensor of shape \(2,\)"),
        ("number", "but it returned a float"),
        ("detached", "must depend on a trainable parameter, but it has no gradient"),
        ("nan", "must be finite, but at 4 points close to the module's weights the loss was nan"),
    ],
)
def test_a_result_that_is_no_loss_is_named(result, message):
    """What training_step returned is in the error, and what to do."""
    with pytest.raises(ProbeError, match=message):
        find_scale_invariance(Module(result), BATCH)


def test_a_training_step_that_needs_a_trainer_is_told_so():
    """Without a Trainer the error carries Lightning's own, and says where to probe."""

    class Needy(Module):
        def training_step(self, batch):
            return super().training_step(batch) * self.trainer.max_epochs

    with pytest.raises(ProbeError, match=r"is not attached to a `Trainer`.*callback's on_train_batch_start"):
        find_scale_invariance(Needy(), BATCH)


def test_a_manual_training_step_must_go_backward():
    """Else nothing is known of its losses; one can be given instead."""
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(ProbeError, match="must call manual_backward or backward, but it did not"):
        find_scale_invariance(module, BATCH)
    assert find_scale_invariance(module, BATCH, forward=lambda m, b: loss(m.net, b))["net.0.weight"].kind == "neuron"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": "float16"}, "`dtype` must be 'auto', 'float64' or 'float32', got 'float16'"),
        ({"draws": 1}, "`draws` must be an integer of at least 2, got 1"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got -1"),
        ({"batch": None}, "`batch` must be given"),
        ({"module": nn.Linear(6, 3)}, "must have a training_step, or `forward` be given, but Linear has none"),
        ({"module": Module().eval()}, r"must be in training mode.*Call module.train\(\) first"),
    ],
)
def test_arguments_are_checked(arguments, message):
    """Each argument out of range is named, with the rule and the value."""
    with pytest.raises(ValueError, match=message):
        find_scale_invariance(**{"module": Module(), "batch": BATCH, **arguments})


def test_a_module_that_cannot_be_copied_is_told_so():
    """The error names the module and what copying it raised."""
    module = Module()
    module.lock = threading.Lock()
    with pytest.raises(ProbeError, match=r"must survive copy.deepcopy.*Module raised TypeError: cannot pickle"):
        find_scale_invariance(module, BATCH)


def test_legacy_weight_norm_is_copied_after_a_forward_pass():
    """It leaves a tensor of the graph behind, which torch refuses to copy; the probe does not need it."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        first = weight_norm(nn.Linear(6, 5))
    net = nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3))
    net(BATCH[0])
    verdicts = find_scale_invariance(net, BATCH, forward=loss)
    assert verdicts["0.weight_v"].kind == "neuron"
    assert verdicts["0.weight_g"].kind == "none"


def test_float32_takes_over_where_float64_fails():
    """The verdict is the same, says which type it rests on and why, and a warning does too."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Module().net

        def forward(self, x):
            if x.dtype == torch.float64:
                raise RuntimeError("this kernel knows no double")
            return self.net(x)

    with pytest.warns(UserWarning, match=r"probed in float32, because float64 failed \(this kernel knows no double\)"):
        verdicts = find_scale_invariance(Picky(), BATCH, forward=loss)
    assert verdicts["net.0.weight"].kind == "neuron"
    assert {v.evidence for v in verdicts.values()} == {"float32"}
    assert "this kernel knows no double" in verdicts["net.0.weight"].reason
    with pytest.raises(ProbeError, match="this kernel knows no double"):
        find_scale_invariance(Picky(), BATCH, forward=loss, dtype="float64")


def test_nothing_invariant_is_said_in_words():
    """A network without normalization gets a sentence, not an error."""
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    verdicts = find_scale_invariance(net, BATCH, forward=loss)
    assert summarize(verdicts).startswith("No parameter is scale-invariant by itself (4 are not, 0 do not reach")


@pytest.mark.parametrize("bias", [True, False])
def test_vanished_gradients_are_not_called_inert(bias):
    """In a deep plain chain the first layers have next to no gradient; nothing is said that is not known."""
    torch.manual_seed(0)
    layers = [part for _ in range(30) for part in (nn.Linear(6, 6, bias=bias), nn.Sigmoid())]
    verdicts = find_scale_invariance(nn.Sequential(*layers, nn.Linear(6, 3)), BATCH, forward=loss)
    assert {v.kind for v in verdicts.values()} == {"none", "unknown"}
    assert verdicts["60.weight"].kind == "none"
    assert "drown in the roundoff" in verdicts["0.weight"].reason


def test_the_certificate_demotes_what_euler_could_not_see():
    """A step in the loss has no gradient, so Euler's relation holds; rescaling by powers of two finds it."""

    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Module().net

        def forward(self, x):
            return self.net(x) * (1 + self.net[0].weight.detach().norm().log2().floor())

    verdicts = find_scale_invariance(Stepped(), BATCH, forward=loss)
    assert verdicts["net.0.weight"].kind == "none"
    assert "rescaling its units by powers of two changed the loss" in verdicts["net.0.weight"].reason
