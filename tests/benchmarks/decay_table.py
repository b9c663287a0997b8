"""What is left of weight decay, network by network: the table and the picture of docs/decay.md.

``python -m tests.benchmarks.decay_table`` prints the table, in half a minute; with ``--picture FILE`` it trains three
runs besides, draws them, and prints how far they are apart.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_normreg import find_symmetries, reduce_decay
from tests.symmetries._small_models import (
    BERT,
    GPT,
    LLAMA,
    QWEN,
    VIT,
    Made,
    Transformer,
    batch_norm,
    everything,
    log_loss,
    matrices,
    resnet,
    trained,
    transformer,
)

NETWORKS: dict[str, Callable[[], Made]] = {
    "BatchNorm chain": batch_norm,
    "ResNet": resnet,
    "Llama": transformer(LLAMA, depth=2),
    "Qwen3 (norms on q and k)": transformer(QWEN, depth=2),
    "GPT-2 (biases, tied head)": transformer(GPT, depth=2),
    "ViT": transformer(VIT, depth=2),
    "BERT (norms after the branches)": transformer(BERT, depth=2),
}
SYMBOLS = {"gamma": "γ", "beta": "β", "bias": "bias"}
RATE = 1e-6
"""So small that 1 − r and exp(−r) are the same."""
CONTEXT, STEPS, LR, DECAY = 32, 300, 0.01, 1.0


def left_of(rates: dict[str, float], roles: dict[str, str]) -> str:
    """Rates that are left, as "γ, β of norm1, norm2: 1": layers whose number does not matter without it."""
    symbols: dict[tuple[str, str], list[str]] = {}
    for name, rate in rates.items():
        if abs(rate) > 1e-3:
            layer, _, own = name.partition("[")[0].rpartition(".")
            what = SYMBOLS.get(roles[name], "weight") if layer else "parameter"
            listed = symbols.setdefault((layer or own, f"{rate:.3g}".replace("-", "−")), [])
            listed += [] if what in listed else [what]
    layers: dict[tuple[str, str], list[str]] = {}
    for (layer, rate), kinds in symbols.items():
        layers.setdefault((", ".join(kinds), rate), []).append(layer)
    return "; ".join(f"{what} of {', '.join(_without_numbers(own))}: {rate}" for (what, rate), own in layers.items())


def _without_numbers(layers: list[str]) -> list[str]:
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(re.sub(r"blocks\.\d\.", "", layer), []).append(layer.removeprefix("blocks."))
    return [f"`{n}`" for short, own in found.items() for n in ([short] if len(own) == 2 else own)]


def markdown() -> str:
    """One row for each network and recipe."""
    lines = ["| network | decay on | is left on, in units of the rate given | removable in the limit |"]
    lines.append("| --- " * 4 + "|")
    for title, make in NETWORKS.items():
        torch.manual_seed(0)
        model, batch = make()
        symmetries = find_symmetries(model.train(), batch, forward=log_loss)
        for recipe, names in {"matrices": matrices(model), "everything": everything(model)}.items():
            reduced = reduce_decay(symmetries, dict.fromkeys(names, RATE))
            left = left_of({n: r / RATE for n, r in reduced.rates.items()}, dict(symmetries.roles))
            decayed = sum(label != "not decayed" for label in reduced.labels.values())
            lines.append(f"| {title} | {recipe} ({decayed}) | {left} | {len(reduced.removable)} of {decayed} |")
    return "\n".join(lines)


def text() -> Tensor:
    """The licence, as numbers of its letters."""
    letters = (Path(__file__).parents[2] / "LICENSE").read_text().lower()
    known = {letter: number for number, letter in enumerate(sorted(set(letters)))}
    return torch.tensor([known[letter] for letter in letters])


def runs() -> dict[str, tuple[list[float], list[float]]]:
    """Training losses, and norms of one matrix, with decay on matrices, its equivalent on gains, and none."""
    data = text()
    torch.manual_seed(0)
    model = Transformer(LLAMA, width=24, words=int(data.max()) + 1)
    batches = data[torch.randint(len(data) - CONTEXT, (STEPS, 8, 1)) + torch.arange(CONTEXT)]

    def loss(module: nn.Module, words: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(words)[:, :-1].flatten(0, 1), words[:, 1:].flatten())

    symmetries = find_symmetries(model.train(), batches[0, :4], forward=loss)
    rates = dict.fromkeys(matrices(model), LR * DECAY)
    reduced = reduce_decay(symmetries, rates)
    state = {name: p.clone() for name, p in model.double().state_dict().items()}
    found = {}
    for label, recipe in {
        "decay on all matrices": (rates, None),
        "decay on all gains, and schedules": (reduced.rates, reduced),
        "no decay": ({}, None),
    }.items():
        model.load_state_dict(state)
        norms: list[float] = []

        def at_step(norms: list[float] = norms) -> Tensor:
            norms.append(float(model.get_parameter("blocks.0.up.weight").detach().norm()))
            return loss(model, batches[len(norms) - 1])

        found[label] = (trained(model, at_step, "adamw", *recipe, lr=LR, steps=STEPS), norms)
    return found


def draw(path: Path) -> None:
    """Losses that lie on each other, of weights that do not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    found = runs()
    for (label, curves), style in zip(found.items(), ("-", (0, (4, 3)), ":"), strict=True):
        for one, values in zip(axes, curves, strict=True):
            means = torch.tensor(values).reshape(-1, 10).mean(dim=1)
            one.plot(
                range(5, STEPS, 10), means, label=label, linestyle=style, linewidth=2.2 if "gains" in label else 1.4
            )
    for one, title in zip(axes, ("training loss", "norm of blocks.0.up"), strict=True):
        one.set(title=title, xlabel="optimizer step (means of 10)")
        one.grid(alpha=0.3)
    axes[1].set(yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
    (ours, _), (theirs, _), (none, _) = found.values()
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"losses differ by up to {apart:.1g}; mean of the last 20: {sum(ours[-20:]) / 20:.2f}, without decay "
          f"{sum(none[-20:]) / 20:.2f}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="where to draw it")
    args = parser.parse_args()
    print(markdown())
    if args.picture:
        draw(args.picture)
