"""The pictures of the documentation, all from real runs of a few seconds: ``python docs/pictures.py [name …]``.

Also prints the numbers that the pages say about them.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import LambdaCallback
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR

from lightning_normreg import (
    CorrectedDecay,
    DecayFreeLR,
    EffectiveLRMonitor,
    NormProjection,
    Plan,
    RotationControl,
    WeightNormMonitor,
    find_scale_invariance,
    plan,
    plot_curves,
)
from lightning_normreg.cli._demo import LABEL_NOISE, TRAINER
from lightning_normreg.demos import DemoConvNet, DemoTransformer, DigitsDataModule, TextDataModule
from lightning_normreg.functional import equilibrium_norm, project_, suggest_projection

EPOCHS, STEPS, NOISE = 20, 400, 0.2  # 20 steps an epoch
CONVOLUTIONS = [f"block{i}.conv.weight" for i in range(1, 5)]
LAYERS = [*CONVOLUTIONS, "head.weight"]
STREAM = "residual_stream"
WRITERS = ["embedding.weight", *(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("o", "down"))]
"""What adds to the stream of the demo's transformer: a set by that name."""
TITLES = {
    "unit_norm_rms": "unit norm n",
    "effective_lr": "effective learning rate, η/nᵖ",
    "effective_lr_not_invariant": "effective_lr_not_invariant",
    "rotation": "rotation per step θ [rad]",
    "equilibrium_ratio": "measured / predicted rotation",
}
PREDICTED = {"unit_norm_rms": "equilibrium_norm", "rotation": "equilibrium_rotation"}
"""Drawn dashed under the curve that it predicts."""

Numbers = dict[str, list[float]]
Optimize = Callable[[DemoConvNet], Any]
Prepare = Callable[[DemoConvNet], DemoConvNet]


def run(
    optimize: Optimize, *callbacks: Callback, prepare: Prepare | None = None, scale: float = 1.0, **options: Any
) -> pd.DataFrame:
    """Train the demo's network, with its convolutions multiplied by ``scale`` at first, and return the curves."""
    seed_everything(0)
    model = DemoConvNet() if prepare is None else prepare(DemoConvNet())
    with torch.no_grad():
        for name in CONVOLUTIONS:
            model.get_parameter(name).mul_(scale)
    model.configure_optimizers = partial(optimize, model)  # type: ignore[method-assign]
    monitors = [WeightNormMonitor(every_n_steps=2), EffectiveLRMonitor(every_n_steps=2)]
    options = {"max_epochs": EPOCHS, "limit_val_batches": 0} | options
    trainer = Trainer(
        callbacks=[*monitors, *callbacks], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(model, DigitsDataModule(label_noise=NOISE))
    return monitors[0].history().merge(monitors[1].history(), on=["step", "epoch"], how="outer")


def text_run(*callbacks: Callback, writers: float = 1.0, branches: float = 1.0, decay: float = 1.0) -> pd.DataFrame:
    """Train the demo's transformer, at first with all that writes to its stream multiplied by ``writers``.

    ``branches`` multiplies what is last in a branch, o and down, and divides what comes before, v and up.
    """
    seed_everything(0)
    model, data = DemoTransformer(weight_decay=decay, width=32), TextDataModule(batch_size=16, context=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(writers if name in WRITERS else 1.0)
            layer = name.split(".")[-2]
            parameter.mul_({"o": branches, "down": branches, "v": 1 / branches, "up": 1 / branches}.get(layer, 1.0))
    losses: list[float] = []
    noting = noting_losses(losses)
    monitors = [WeightNormMonitor(every_n_steps=5), EffectiveLRMonitor(every_n_steps=5)]
    trainer = Trainer(
        callbacks=[*monitors, *callbacks, noting], max_steps=STEPS, limit_val_batches=0, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    history = monitors[0].history().merge(monitors[1].history(), on=["step", "epoch"], how="outer")
    return history.merge(smooth(losses), on="step")


def noting_losses(losses: list[float]) -> Callback:
    """Keeps the training loss of each step."""
    return LambdaCallback(on_train_batch_end=lambda trainer, module, outputs, *_: losses.append(float(outputs["loss"])))


def smooth(losses: list[float]) -> pd.DataFrame:
    """Means of the last 20 steps."""
    return pd.Series(losses, name="loss").rolling(20).mean().rename_axis("step").reset_index()


def demo_run() -> tuple[pd.DataFrame, list[str]]:
    """The curves of ``lightning-normreg demo``, and what it says of equilibrium."""
    seed_everything(0)
    monitors = [WeightNormMonitor(), EffectiveLRMonitor()]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(**TRAINER, **quiet, callbacks=monitors).fit(DemoConvNet(), DigitsDataModule(label_noise=LABEL_NOISE))  # type: ignore[arg-type]
    history = monitors[0].history().merge(monitors[1].history(), on=["step", "epoch"], how="outer")
    return history, monitors[1].equilibrium_status()


def demo_numbers(history: pd.DataFrame) -> Numbers:
    """Of each layer the norm at the end over that at the start, and the mean rotation in the last quarter."""
    found = {}
    for layer in LAYERS:
        norm, rotation = (history[f"weights/{what}/{layer}"].dropna() for what in ("unit_norm_rms", "rotation"))
        found[layer] = [float(norm.iloc[-1] / norm.iloc[0]), float(rotation.iloc[len(rotation) * 3 // 4 :].mean())]
    return found


def demo() -> Figure:
    """What the demo draws; the numbers are kept in the picture, so that a test can compare it with a run."""
    history, _ = demo_run()
    figure = plot_curves(history)
    figure.set_label(json.dumps(demo_numbers(history)))
    return figure


def sgd(model: DemoConvNet, lr: float = 0.05, decay: float = 0.01, **settings: Any) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum on the demo's decay groups."""
    return torch.optim.SGD(model.decay_groups(decay, **settings), lr=lr, momentum=0.9, nesterov=True)


def adamw(model: DemoConvNet, lr: float = 0.005, decay: float = 1.0, head: float | None = 0.0) -> torch.optim.Optimizer:
    """AdamW, whose decay leaves the head alone by default."""
    overrides = {} if head is None else {"head.weight": head}
    return torch.optim.AdamW(model.decay_groups(decay, overrides=overrides), lr=lr)


def scheduled(scheduler: Any) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for a schedule by batch."""
    return {"optimizer": scheduler.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def cosine(model: DemoConvNet) -> dict[str, Any]:
    """From 0.05 to a fiftieth of it over all steps."""
    return scheduled(CosineAnnealingLR(sgd(model, decay=0.02), STEPS, eta_min=0.001))


def panels(count: int, height: float = 2.9) -> tuple[Figure, Any]:
    """A row of empty axes."""
    figure = Figure(figsize=(3.4 * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def draw(axes: Any, history: pd.DataFrame, tag: str, **style: Any) -> None:
    """One curve."""
    if tag in history:
        values = history[["step", tag]].dropna()
        axes.plot(values["step"], values[tag], **({"linewidth": 1.2} | style))
        axes.set(xlabel="optimizer step", yscale="log")
        axes.grid(alpha=0.3)


def by_layer(
    history: pd.DataFrame,
    keys: Sequence[str] = ("unit_norm_rms", "effective_lr", "rotation"),
    layers: Sequence[str] = LAYERS,
) -> Figure:
    """A panel for each quantity, a colour for each layer; predictions of the equilibrium dashed."""
    figure, all_axes = panels(len(keys), 3.2)
    for axes, key in zip(all_axes, keys, strict=True):
        for number, layer in enumerate(layers):
            draw(axes, history, f"weights/{key}/{layer}", color=f"C{number}", label=layer.removesuffix(".weight"))
            if key in PREDICTED:
                draw(
                    axes,
                    history,
                    f"weights/{PREDICTED[key]}/{layer}",
                    color=f"C{number}",
                    linestyle="--",
                    linewidth=0.8,
                )
        axes.set(title=TITLES[key])
        low, high = axes.get_ylim()
        if high < 1.5 * low:  # constant up to rounding, which is nothing to look at
            axes.set_ylim(low / 3, high * 3)
    handles = {h.get_label(): h for axes in all_axes for h in axes.get_legend_handles_labels()[0]}
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=5, fontsize="small")
    return figure


def _without_eps(model: DemoConvNet) -> DemoConvNet:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-10  # so that the scale of a weight has no effect at all
    return model


def equivalent() -> Figure:
    """A recipe with decay, the same as a schedule without, and no decay with nothing in its place."""

    def optimize(model: DemoConvNet, decay: float, free: bool) -> Any:
        rest = [p for name, p in model.named_parameters() if name not in CONVOLUTIONS]
        groups = [{"params": [model.get_parameter(n) for n in CONVOLUTIONS], "weight_decay": decay}, {"params": rest}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        return scheduled(DecayFreeLR(optimizer)) if free else optimizer

    layer, recipes = (
        CONVOLUTIONS[2],
        {"lr 0.05, decay 0.01": (0.01, False), "no decay, lr of DecayFreeLR": (0.01, True)},
    )
    recipes["lr 0.05, no decay"] = (0.0, False)
    figure, axes = panels(3, 3.2)
    histories = {}
    for (label, (decay, free)), style in zip(recipes.items(), ("-", (0, (4, 3)), ":"), strict=True):
        history = run(partial(optimize, decay=decay, free=free), prepare=_without_eps, precision="64-true")
        history["lr"] = history[f"weights/effective_lr/{layer}"] * history[f"weights/unit_norm_rms/{layer}"] ** 2
        histories[label] = history
        look = {
            "label": label,
            "linestyle": style,
            "linewidth": 2.2 if free else 1.4,
            "color": f"C{len(histories) - 1}",
        }
        for one, tag in zip(
            axes, ("lr", f"weights/unit_norm_rms/{layer}", f"weights/effective_lr/{layer}"), strict=True
        ):
            draw(one, history, tag, **look)
    for one, title in zip(
        axes, ("learning rate η", "norm n of block3.conv", "effective learning rate η/n²"), strict=True
    ):
        one.set(title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    ours, theirs, _ = (h[[c for c in h if c.startswith("weights/effective_lr/block")]] for h in histories.values())
    print(f"equivalent: effective rates differ by a factor of up to 1 + {(theirs / ours - 1).abs().max().max():.1e}; "
          f"lr grows {histories['no decay, lr of DecayFreeLR']['lr'].iloc[-1] / 0.05:.0f}-fold")  # fmt: skip
    return figure


def scale_invariance() -> Figure:
    """Loss, gradient and eps share of a normalized weight and of one that is not, multiplied by a number."""
    made: list[DemoConvNet] = []
    run(sgd, prepare=lambda model: made.append(model) or model, max_epochs=3)
    data = DigitsDataModule()
    data.setup("fit")
    images, labels = data.train_set[:100]
    figure, axes = panels(3)
    factors, far = [10 ** (e / 4) for e in range(-18, 9)], [10.0**e for e in range(-4, 3)]
    for name, color in {CONVOLUTIONS[3]: "C0", "head.weight": "C2"}.items():
        weight = made[0].get_parameter(name)
        original, losses, gradients = weight.detach().clone(), [], []
        for factor in factors:
            weight.data.copy_(original * factor)
            loss = nn.functional.cross_entropy(made[0](images), labels)
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, weight)[0].norm().item())
        axes[0].plot(factors, losses, color=color, label=name)
        axes[1].plot(factors, gradients, color=color, label=name)
        if color == "C0":
            axes[1].plot(factors, [gradients[18] / f for f in factors], "k:", linewidth=0.8, label="∝ 1/a")
            shares = []
            for factor in far:
                weight.data.copy_(original * factor)
                shares.append(find_scale_invariance(made[0], [images[:4], labels[:4]])[name].rho_median)
            axes[2].plot(far, shares, "o-", markersize=3, label=name)
        weight.data.copy_(original)
    for one, title in zip(axes, ("loss", "‖gradient‖", "eps share, eps/(var + eps)"), strict=True):
        one.set(title=title, xscale="log", yscale="log", xlabel="weight multiplied by a")
        one.grid(alpha=0.3)
        one.legend(fontsize="small")
    return figure


def rotation() -> Figure:
    """The way of a unit of two entries whose gradient is of length 1/‖w‖ and of random sign."""
    lr, decay, steps = 0.05, 0.5, 90
    figure, axes = panels(3, 3.6)
    for one, title in zip(axes, ("no decay", "decay", "projection"), strict=True):
        generator = torch.Generator().manual_seed(3)
        weight = nn.Parameter(torch.tensor([0.75, 0.0]))
        optimizer = torch.optim.SGD([weight], lr=lr, weight_decay=decay if title == "decay" else 0.0)
        way = [weight.detach().clone()]
        for _ in range(steps):
            sign = 1.0 if torch.rand((), generator=generator) < 0.75 else -1.0
            x, y = weight.detach().tolist()
            weight.grad = sign * torch.tensor([y, -x]) / (x**2 + y**2)
            optimizer.step()
            if title == "projection":
                project_(weight.data[None], 0.75)
            way.append(weight.detach().clone())
        points = torch.stack(way)
        one.plot(*points.T, ".-", markersize=3, linewidth=0.7)
        one.plot([0], [0], "k+")
        angle = 2 * math.pi * torch.arange(101) / 100
        norm = {"decay": equilibrium_norm("sgd", lr=lr, weight_decay=decay, gradient_norm=1.0), "projection": 0.75}
        if title in norm:
            one.plot(norm[title] * angle.cos(), norm[title] * angle.sin(), "k:", linewidth=0.8)
        unit = points / points.norm(dim=1, keepdim=True)
        turned = (unit[1:] * unit[:-1]).sum(1).clamp(max=1).acos()
        ends = f"θ {turned[:10].mean():.2f} → {turned[-10:].mean():.2f} rad"
        one.set(title=f"{title}: {ends}", aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xlabel="w₁", ylabel="w₂")
    return figure


def equilibrium() -> Figure:
    """One recipe from three initial norms."""
    layer = CONVOLUTIONS[2]
    figure, axes = panels(3, 3.2)
    for number, scale in enumerate((0.3, 1.0, 3.0)):
        history = run(partial(sgd, lr=0.05, decay=0.02), scale=scale)
        for one, key in zip(axes, ("unit_norm_rms", "rotation", "equilibrium_ratio"), strict=True):
            draw(one, history, f"weights/{key}/{layer}", color=f"C{number}", label=f"initial norm × {scale:g}")
            if key in PREDICTED and scale == 1.0:
                draw(one, history, f"weights/{PREDICTED[key]}/{layer}", color="k", linestyle="--", label="equilibrium")
            one.set(title=TITLES[key])
        end = history[history["step"] >= 0.75 * STEPS]
        ratios = [
            (end[f"weights/{key}/{layer}"] / end[f"weights/{predicted}/{layer}"]).mean()
            for key, predicted in PREDICTED.items()
        ]
        half_life = end[f"weights/equilibrium_half_life/{layer}"].iloc[-1]
        print(f"equilibrium, initial norm × {scale:g}: norm and rotation over predicted in the last quarter "
              f"{ratios[0]:.2f}, {ratios[1]:.2f}; half-life {half_life:.0f} steps")  # fmt: skip
    axes[2].axhspan(0.85, 1.15, color="k", alpha=0.08)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def balance() -> Figure:
    """AdamW with decay, with one radius for all, and with the radii of the equilibrium."""
    lr, decay = 0.005, 1.0
    entries = {name: DemoConvNet().get_parameter(name)[0].numel() for name in CONVOLUTIONS}
    radii = {
        name: suggest_projection("adam_decoupled", lr=lr, weight_decay=decay, entries=count).radius
        for name, count in entries.items()
    }
    print(f"balance: radii { ({name: round(r, 3) for name, r in radii.items()}) }")
    held = [NormProjection(radius, include=[name]) for name, radius in radii.items()]
    cases: dict[str, tuple[float, list[Callback]]] = {
        "decay": (decay, []),
        "projection, radius 1 for all": (0.0, [NormProjection()]),
        "projection, radii of the equilibrium": (0.0, held),
    }
    figure, all_axes = panels(3, 3.2)
    for axes, (title, (used, callbacks)) in zip(all_axes, cases.items(), strict=True):
        history = run(partial(adamw, lr=lr, decay=used), *callbacks)
        ends = []
        for number, layer in enumerate(CONVOLUTIONS):
            draw(axes, history, f"weights/rotation/{layer}", color=f"C{number}", label=layer.removesuffix(".weight"))
            ends.append(history[history["step"] >= 0.75 * STEPS][f"weights/rotation/{layer}"].mean())
        axes.set(title=title, ylim=(1e-3, 0.1))
        print(f"balance, {title}: rotations of the last quarter {[round(float(e), 4) for e in ends]}, "
              f"largest over smallest {max(ends) / min(ends):.1f}")  # fmt: skip
    all_axes[0].set(ylabel=TITLES["rotation"])
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def corrected() -> Figure:
    """A cosine schedule under decay, and with the decay that follows it."""
    figure, axes = panels(3, 3.2)
    layer, keys = CONVOLUTIONS[2], ("unit_norm_rms", "effective_lr", "rotation")
    for label, callbacks in {"decay": [], "CorrectedDecay": [CorrectedDecay()]}.items():
        history = run(cosine, *callbacks)
        for one, key in zip(axes, keys, strict=True):
            draw(one, history, f"weights/{key}/{layer}", label=label)
            one.set(title=TITLES[key])
    schedule = 0.001 + 0.049 * (1 + (math.pi * torch.arange(STEPS) / STEPS).cos()) / 2
    end = float(history[f"weights/effective_lr/{layer}"].iloc[-1])
    axes[1].plot(range(STEPS), schedule * end / schedule[-1], "k:", linewidth=0.8, label="the schedule, scaled")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def without_norm() -> Figure:
    """The second block without its BatchNorm, and with an activation that is not homogeneous."""

    def prepare(model: DemoConvNet) -> DemoConvNet:
        model.block2 = nn.Sequential(OrderedDict(conv=model.block2.conv, act=nn.GELU()))
        return model

    return by_layer(run(sgd, prepare=prepare), ("effective_lr", "effective_lr_not_invariant", "rotation"))


def warm_up() -> Figure:
    """From small norms into a high learning rate."""
    return by_layer(run(lambda model: scheduled(LinearLR(sgd(model, lr=0.2, decay=0.005), 0.02, 1.0, 60)), scale=0.5))


def one_off() -> Figure:
    """A layer that somebody took out of the decay."""
    return by_layer(run(partial(sgd, overrides={"block3.conv.weight": 0.0}, decay=0.02)))


def small_decay() -> Figure:
    """An equilibrium that the run is too short for."""
    return by_layer(run(partial(sgd, decay=2e-4)))


def stream() -> Figure:
    """What writes to the stream of a transformer, as one unit, and each member beside it."""
    history = text_run()
    end = history.iloc[-1]
    keys = ("unit_norm_rms", "effective_lr", "rotation", "equilibrium_ratio")
    figure = by_layer(history, keys, [*WRITERS, STREAM])
    figure.axes[3].axhspan(0.85, 1.15, color="k", alpha=0.08)
    later = history[history["step"] >= STEPS / 8][f"weights/equilibrium_ratio/{STREAM}"]
    turned = [float(end[f"weights/rotation/{name}"]) for name in (STREAM, *WRITERS)]
    print(f"read_stream: measured over predicted rotation after warm-up {later.min():.2f} to {later.max():.2f}, "
          f"inside the band {(abs(later - 1) <= 0.15).mean():.0%}; rotations at the end, of the set and its members, "
          f"{[round(r, 4) for r in turned]}")  # fmt: skip
    return figure


def stream_scale() -> Figure:
    """From two initial scales of all that writes to the stream, plain and with one angle for it."""
    figure, axes = panels(3, 3.2)
    for number, (name, control) in enumerate({"AdamW": False, "RotationControl": True}.items()):
        for scale, style in ((1.0, "-"), (8.0, "--")):
            callbacks = [RotationControl("equilibrium", unit="set")] if control else []
            history = text_run(*callbacks, writers=scale, decay=0.1)
            look = {"color": f"C{number}", "linestyle": style, "label": f"{name}, writers × {scale:g}"}
            for one, tag in zip(
                axes, (*(f"weights/{k}/{STREAM}" for k in ("unit_norm_rms", "rotation")), "loss"), strict=True
            ):
                draw(one, history, tag, **look)
            print(f"read_stream_scale, {look['label']}: loss of the last 20 steps {history['loss'].iloc[-1]:.3f}")
    for one, title in zip(
        axes, (*(TITLES[key] for key in ("unit_norm_rms", "rotation")), "training loss"), strict=True
    ):
        one.set(title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def stream_shares() -> Figure:
    """Shares of the square of the set's norm, from two weights of one function, and what they do to its curves."""
    figure, axes = panels(3, 3.2)
    cases = {"as initialized": 1.0, "o, down × 8; v, up / 8": 8.0}
    for number, (title, factor) in enumerate(cases.items()):
        history = text_run(branches=factor)
        for index, name in enumerate(WRITERS):
            tag, short = f"weights/set_share/{name}", name.removesuffix(".weight")
            draw(axes[number], history, tag, color=f"C{index}", label=short)
        draw(axes[2], history, f"weights/effective_lr/{STREAM}", color="k", linestyle=("-", "--")[number], label=title)
        axes[number].set(title=f"set_share, {title}", ylim=(0.005, 1))
        of_set = [f"weights/{key}/{STREAM}" for key in ("weight_norm", "rotation", "effective_lr", "equilibrium_ratio")]
        for tag in (*of_set, *(c for c in history if "/set_share/" in c or "/balance/" in c)):
            values = history[tag]
            print(f"read_stream_shares, {title}: {tag} {values.iloc[0]:.3g} → {values.iloc[-1]:.3g}")
    axes[2].set(title="effective_lr of the set")
    axes[2].legend(fontsize="small")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    return figure


def replay() -> Figure:
    """The rotations of a run with decay, on one with a far smaller learning rate, none, and ten times the weights."""

    def far(model: DemoConvNet) -> torch.optim.Optimizer:
        mine = [model.get_parameter(name) for name in CONVOLUTIONS]
        rest = [p for name, p in model.named_parameters() if name not in CONVOLUTIONS]
        return torch.optim.AdamW([{"params": mine, "lr": 1e-5}, {"params": rest}], lr=0.005, weight_decay=0.0)

    layer, keys = CONVOLUTIONS[2], ("unit_norm_rms", "rotation")
    losses: dict[str, list[float]] = {}
    figure, axes = panels(3, 3.2)

    def add(label: str, optimize: Optimize, *callbacks: Callback, scale: float = 1.0, **style: Any) -> pd.DataFrame:
        losses[label] = []
        history = run(optimize, *callbacks, noting_losses(losses[label]), scale=scale)
        for one, key in zip(axes, keys, strict=False):
            draw(one, history, f"weights/{key}/{layer}", label=label, **style)
        draw(axes[2], smooth(losses[label]), "loss", label=label, **style)
        print(f"replay, {label}: training loss of the last 20 steps {sum(losses[label][-20:]) / 20:.3f}")
        return history

    log = add("AdamW, lr 0.005, decay 1", adamw)
    add("lr / 500, no decay, weights × 10", far, scale=10.0)
    add("the same with replay=", far, RotationControl(replay=log), scale=10.0, linestyle=(0, (4, 3)))
    for one, title in zip(axes, (*(TITLES[key] for key in keys), "training loss"), strict=True):
        one.set(title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "demo": demo,
    "equivalent": equivalent,
    "scale_invariance": scale_invariance,
    "rotation": rotation,
    "equilibrium": equilibrium,
    "balance": balance,
    "corrected": corrected,
    "replay": replay,
    "read_no_decay": lambda: by_layer(run(partial(sgd, decay=0.0))),
    "read_level": lambda: by_layer(run(partial(sgd, decay=0.03))),
    "read_small_decay": small_decay,
    "read_warm_up": warm_up,
    "read_one_off": one_off,
    "read_projected": lambda: by_layer(run(partial(sgd, decay=0.0), NormProjection())),
    "read_schedule": lambda: by_layer(run(cosine)),
    "read_not_invariant": without_norm,
    "read_stream": stream,
    "read_stream_scale": stream_scale,
    "read_stream_shares": stream_shares,
}


PLANNED_EPOCHS = 60


def _planned(model: DemoConvNet) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW, and a warm-up and cosine of 1200 steps."""
    optimizer = torch.optim.AdamW(model.decay_groups(1.0), lr=0.003, betas=(0.9, 0.95))
    steps = 20 * PLANNED_EPOCHS
    return optimizer, [min(1, (s + 1) / 60) * (1.05 + 0.95 * math.cos(math.pi * s / steps)) / 2 for s in range(steps)]


def planned() -> Plan:
    """Of the demo's network, before anything is trained."""
    seed_everything(0)
    model, data = DemoConvNet(), DigitsDataModule(label_noise=NOISE)
    data.setup("fit")
    verdict = find_scale_invariance(model, next(iter(data.train_dataloader())), progress=False)
    return plan(model, *_planned(model), invariance=verdict)


def plan_alone() -> Figure:
    """Nothing is trained."""
    return plot_curves(planned().to_frame())


def plan_beside_run() -> Figure:
    """The same, trained."""

    def optimize(model: DemoConvNet) -> Any:
        optimizer, factors = _planned(model)
        return scheduled(LambdaLR(optimizer, lambda step: factors[min(step, len(factors) - 1)]))

    history = run(optimize, max_epochs=PLANNED_EPOCHS)
    return plot_curves(history, plan=planned().to_frame())


PICTURES |= {"plan": plan_alone, "plan_beside_run": plan_beside_run}


def main() -> None:
    """Draw all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PICTURES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images", help="folder")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_normreg"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in args.names or PICTURES:
        drawn, figure, info = BytesIO(), PICTURES[name](), PngInfo()
        figure.savefig(drawn, dpi=100)
        info.add_text("Description", str(figure.get_label()))
        Image.open(drawn).convert("RGB").quantize(64).save(args.out / f"{name}.png", optimize=True, pnginfo=info)


if __name__ == "__main__":
    main()
