"""Bad input is a clear error before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import BaseFinetuning

from lightning_normreg import EffectiveLRMonitor, NormProjection, WeightNormMonitor, register_update_rule
from lightning_normreg._optimizers._lookup import _REGISTERED
from lightning_normreg.steps._step_hooks import torch_optimizer
from tests.harness import Net, loader, sgd, trainer

INCLUDE = ["conv1.weight"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NormProjection(-1.0, include=INCLUDE), r"`radius` must be positive and finite, got -1\.0\. Use"),
        (lambda: NormProjection(0, include=INCLUDE), "`radius` must be positive and finite, got 0"),
        (lambda: NormProjection(float("nan"), include=INCLUDE), "`radius` must be positive and finite, got nan"),
        (lambda: NormProjection("big", include=INCLUDE), "`radius` must be 'auto', 'initial' or a positive number"),
        (lambda: NormProjection(on_not_invariant="warn"), "`on_not_invariant` must be 'raise', 'skip' or 'allow'"),
        (
            lambda: NormProjection(include=INCLUDE, unit="filter"),
            "`unit` must be one of 'auto', 'neuron', 'column', 'layer'",
        ),
        (
            lambda: WeightNormMonitor(unit="row"),
            "`unit` must be one of 'auto', 'neuron', 'column', 'layer', 'set', got 'row'",
        ),
        (lambda: WeightNormMonitor(0), "`every_n_steps` must be a positive integer or None, got 0"),
        (lambda: EffectiveLRMonitor(per_layer="all"), "`per_layer` must be True, False or 'auto', got 'all'"),
        (lambda: WeightNormMonitor(prefix="a/"), "`prefix` must be the first part of tags, without a slash around"),
        (lambda: EffectiveLRMonitor(logging_interval="batch"), "`logging_interval` must be 'step' or 'epoch'"),
    ],
)
def test_arguments_out_of_range(make: Any, message: str) -> None:
    """The constructor names the argument, the rule and the value."""
    with pytest.raises(ValueError, match=message):
        make()


def test_a_glob_that_is_no_list() -> None:
    """A single string would be read letter by letter."""
    with pytest.raises(TypeError, match=r"`include` must be a list of globs, got '\*\.weight'"):
        WeightNormMonitor(include="*.weight")


class Untouched(Net):
    """Fails if a step is made; the probe may call ``training_step`` on its copy."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Too late for an error."""
        raise AssertionError("a step was made")


@pytest.mark.parametrize("make", [WeightNormMonitor, EffectiveLRMonitor, NormProjection])
def test_a_glob_that_matches_nothing(make: Any) -> None:
    """Near misses are named, before the first batch."""
    with pytest.raises(ValueError, match=r"'conv\.weight' matches none\. Near misses: 'conv1\.weight'"):
        trainer(make(include=["conv.weight"])).fit(Untouched(sgd()), loader())
    with pytest.raises(ValueError, match=r"`exclude` must match at least one parameter, but 'nothing\*'"):
        trainer(make(include=["*"], exclude=["nothing*"])).fit(Untouched(sgd()), loader())


def test_projecting_a_frozen_parameter() -> None:
    """Refused, unless a finetuning callback is there to thaw it."""
    net = Untouched(sgd())
    net.conv1.weight.requires_grad = False
    with pytest.raises(ValueError, match=r"'conv1\.weight' is frozen or in no optimizer\. Train it"):
        trainer(NormProjection(include=INCLUDE)).fit(net, loader())


class Thaw(BaseFinetuning):
    """Freezes a layer at first."""

    def freeze_before_training(self, pl_module: Any) -> None:
        """The first convolution."""
        self.freeze(pl_module.conv1)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        """Give it to the optimizer in the second epoch."""
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.conv1, optimizer, lr=1e-3)


def test_a_frozen_parameter_that_is_thawed_is_projected_from_then_on() -> None:
    """Before that it keeps its norm; when it joins the optimizer it is projected before its first step."""

    class Frozen(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    net = Frozen(sgd())
    start = net.conv1.weight.detach().double().clone()
    trainer(Thaw(), NormProjection(unit="neuron", include=INCLUDE, on_not_invariant="allow"), max_epochs=2).fit(
        net, loader()
    )
    assert all(torch.equal(step.before["conv1.weight"], start) for step in net.steps[:6])
    for step in net.steps[6:]:
        for weight in (step.before["conv1.weight"], step.after["conv1.weight"]):
            assert (weight.flatten(1).norm(dim=1) - 1).abs().max() < 1e-6
    assert not torch.equal(net.steps[6].before["conv1.weight"], net.steps[6].after["conv1.weight"])


def test_two_projections_that_claim_one_weight() -> None:
    """An error that names both; disjoint ones are fine, also with different radii."""
    both = [NormProjection(1.0, include=["conv1.*"]), NormProjection(2.0, include=["conv*.weight"])]
    with pytest.raises(ValueError, match=r"'conv1\.weight' must be held by one callback"):
        trainer(*both).fit(Untouched(sgd()), loader())
    net = Net(sgd())
    apart = [
        NormProjection(1.0, include=["conv1.weight"]),
        NormProjection(2.0, unit="neuron", include=["head.weight"], on_not_invariant="allow"),
    ]
    trainer(*apart).fit(net, loader())
    assert net.conv1.weight.flatten(1).norm(dim=1).detach() == pytest.approx(torch.ones(6), abs=1e-6)
    assert net.head.weight.norm(dim=1).detach() == pytest.approx(torch.full((3,), 2.0), abs=2e-6)


class Stranger:
    """Looks like an optimizer, but is none; ``isinstance`` of Lightning's protocol is satisfied."""

    param_groups: list[Any]
    defaults: dict[str, Any]
    state: dict[Any, Any]

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        self.defaults, self.state = {}, {}

    def step(self, closure: Any = None) -> Any:
        """Nothing."""
        return closure()

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def zero_grad(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("callback", [EffectiveLRMonitor(), NormProjection(include=INCLUDE)])
def test_an_optimizer_that_is_no_torch_optimizer(callback: Any) -> None:
    """Its steps cannot be seen, which is said."""

    class Strange(Untouched):
        def configure_optimizers(self) -> Any:
            return Stranger(self.parameters())

    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer or wrap one, got Stranger"):
        trainer(callback).fit(Strange(sgd()), loader())


@pytest.mark.pitfall(10)
def test_a_wrapper_around_a_torch_optimizer_is_seen_through() -> None:
    """A wrapper without hooks of its own: the inner optimizer's steps are counted."""

    class Wrapper(Stranger):
        def __init__(self, optimizer: Any) -> None:
            super().__init__([])
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    class Wrapped(Net):
        def configure_optimizers(self) -> Any:
            return Wrapper(torch.optim.SGD(self.parameters(), lr=0.1))

    run = trainer(EffectiveLRMonitor())
    run.fit(Wrapped(sgd()), loader())
    assert "weights/effective_lr_not_invariant/head.weight" in run.callback_metrics


def test_an_optimizer_without_a_rule() -> None:
    """Rotation and relative update are logged; why the effective rate is missing is said once."""

    class Sign(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 1e-3})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign(), alpha=group["lr"])

    run = trainer(EffectiveLRMonitor())
    with pytest.warns(UserWarning, match=r"register_update_rule\(Sign, exponent=…, decay=…\)") as caught:
        run.fit(Net(Sign), loader())
    assert len([w for w in caught if "Sign" in str(w.message)]) == 1
    assert "weights/rotation/head.weight" in run.callback_metrics
    assert not [key for key in run.callback_metrics if "effective_lr" in key]

    register_update_rule(Sign, exponent=0, decay="none")
    try:
        with pytest.warns(UserWarning, match=r"grows with the weight \(p = 0\)"):
            trainer(EffectiveLRMonitor()).fit(Net(Sign), loader())
        register_update_rule(Sign, exponent=1, decay="none")
        run = trainer(EffectiveLRMonitor())
        run.fit(Net(Sign), loader())
        assert "weights/effective_lr/conv1.weight" in run.callback_metrics
    finally:
        del _REGISTERED[Sign]


def test_a_flat_shard_is_refused() -> None:
    """The norm of a local piece of FSDP's first version would be a wrong number."""
    net = Untouched(sgd())
    net.conv1.weight._fsdp_flattened = True
    with pytest.raises(NotImplementedError, match=r"'conv1\.weight' is a piece of FSDP's first version"):
        trainer(EffectiveLRMonitor()).fit(net, loader())


@pytest.mark.pitfall(10)
def test_deepspeed_is_refused() -> None:
    """Its optimizer wraps one of torch, whose parameters are flat partitions."""
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    wrapper = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    wrapper.optimizer = inner
    with pytest.raises(
        NotImplementedError, match=r"DeepSpeedZeroOptimizer updates flat partitions .* Use FSDPStrategy"
    ):
        torch_optimizer(wrapper)
