"""Every optimizer that has a rule and can be run here, made from a list of parameters and a learning rate."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

Make = Callable[[list[Parameter], float], Optimizer]


def case(path: str, **options: Any) -> Make:
    """An optimizer by the path of its class, which is imported only when it is made."""

    def make(parameters: list[Parameter], lr: float) -> Optimizer:
        module, _, name = path.rpartition(".")
        optimizer: Optimizer = getattr(import_module(module), name)(parameters, lr=lr, **options)
        if hasattr(optimizer, "train"):  # of schedule-free optimizers
            optimizer.train()
        return optimizer

    return make


def muon_of_pytorch_optimizer(parameters: list[Parameter], lr: float) -> Optimizer:
    """It wants a flag in every group."""
    made: Optimizer = import_module("pytorch_optimizer").Muon([{"params": parameters, "use_muon": True}], lr=lr)
    return made


TORCH: dict[str, Make] = {
    "sgd": case("torch.optim.SGD"),
    "momentum": case("torch.optim.SGD", momentum=0.9, dampening=0.5),
    "nesterov": case("torch.optim.SGD", momentum=0.9, nesterov=True),
    "maximize-foreach": case("torch.optim.SGD", momentum=0.9, maximize=True, foreach=True),
    "asgd": case("torch.optim.ASGD"),
    "adam": case("torch.optim.Adam"),
    "amsgrad": case("torch.optim.Adam", amsgrad=True),
    "fused": case("torch.optim.Adam", fused=True),
    "adamw": case("torch.optim.AdamW", weight_decay=0.0),
    "nadam": case("torch.optim.NAdam"),
    "radam": case("torch.optim.RAdam"),
    "adamax": case("torch.optim.Adamax"),
    "rmsprop": case("torch.optim.RMSprop"),
    "rmsprop-centered": case("torch.optim.RMSprop", centered=True, momentum=0.9),
    "adagrad": case("torch.optim.Adagrad"),
    "adadelta": case("torch.optim.Adadelta", eps=1e-12),
    "rprop": case("torch.optim.Rprop", step_sizes=(1e-30, 1.0)),
    "adafactor": case("torch.optim.Adafactor"),
    "muon": case("torch.optim.Muon", weight_decay=0.0),
}
PACKAGES: dict[str, Make] = {
    "lion_pytorch": case("lion_pytorch.Lion"),
    "lion_pytorch-cautious": case("lion_pytorch.cautious_lion.Lion"),
    "schedulefree-sgd": case("schedulefree.SGDScheduleFree"),
    "schedulefree-sgd-warmup": case("schedulefree.SGDScheduleFree", warmup_steps=5),
    "schedulefree-adamw": case("schedulefree.AdamWScheduleFree"),
    "schedulefree-radam": case("schedulefree.RAdamScheduleFree"),
    "adamp": case("adamp.AdamP"),
    "sgdp": case("adamp.SGDP", momentum=0.9),
    "prodigyopt": case("prodigyopt.Prodigy"),
    "transformers-adafactor": case("transformers.optimization.Adafactor", relative_step=False),
    "transformers-adafactor-unscaled": case(
        "transformers.optimization.Adafactor", relative_step=False, scale_parameter=False
    ),
    "pytorch_optimizer-Muon": muon_of_pytorch_optimizer,
    "pytorch_optimizer-AdaFactor-unscaled": case(
        "pytorch_optimizer.AdaFactor", relative_step=False, scale_parameter=False
    ),
    "pytorch_optimizer-Lamb-adam": case("pytorch_optimizer.Lamb", adam=True),
    "pytorch_optimizer-AdaFactor": case("pytorch_optimizer.AdaFactor", relative_step=False),
} | {
    f"pytorch_optimizer-{name}": case(f"pytorch_optimizer.{name}")
    for name in (
        "ADOPT",
        "AdEMAMix",
        "AdamP",
        "Adan",
        "DAdaptAdam",
        "DAdaptLion",
        "LARS",
        "Lamb",
        "Lion",
        "Prodigy",
        "RAdam",
        "SGDP",
        "SGDW",
        "SOAP",
        "ScheduleFreeAdamW",
        "ScheduleFreeSGD",
        "Shampoo",
        "SignSGD",
        "StableAdamW",
        "Tiger",
    )
}


def radial_free(weight: Tensor, gradient: Tensor) -> Tensor:
    """The part of a gradient that is orthogonal to every row, as that of a row that is scale-invariant."""
    return gradient - (gradient * weight).sum(1, keepdim=True) / (weight * weight).sum(1, keepdim=True) * weight
