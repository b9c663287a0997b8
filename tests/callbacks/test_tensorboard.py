"""What loggers get besides curves: histograms, hyperparameters, and never more than a page can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch import nn

from lightning_normreg import (
    EffectiveLRMonitor,
    NormProjection,
    NormSummary,
    WeightNormMonitor,
    decay_groups,
    find_scale_invariance,
)
from lightning_normreg._symmetries import verdict_to_dict
from lightning_normreg.callbacks._tensorboard import write_histograms
from tests.harness import Net, RecordingLogger, loader, sgd, trainer


def accumulated(folder: Any) -> EventAccumulator:
    """What a folder's event files hold."""
    return EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()


def rows_of(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Norms of the units of :class:`Net`'s weights, in float64, by their definition."""
    if name == "up.weight":  # transposed, two groups of two neurons each
        return torch.stack([weight[3 * g : 3 * g + 3, o].norm() for g in range(2) for o in range(2)])
    return torch.stack([row.norm() for row in weight]) if name == "conv1.weight" else weight.norm().reshape(1)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_histograms_are_of_the_norms_before_the_step(interval: Any, tmp_path: Path) -> None:
    """Count, extremes, sum and sum of squares of the units, from the weights that the net has recorded."""
    logger = TensorBoardLogger(tmp_path, prefix="p")
    net = Net(sgd())
    monitor = WeightNormMonitor(histograms=True, logging_interval=interval)
    trainer(monitor, logger=logger, log_every_n_steps=2, max_epochs=2).fit(net, loader())
    found = accumulated(logger.log_dir)
    names = ["conv1.weight", "head.weight", "up.weight"]
    assert sorted(found.Tags()["histograms"]) == [f"p-weights/unit_norms/{name}" for name in names]
    steps = {"step": [0, 1, 3, 5, 7, 9, 11], "epoch": [5, 11]}[interval]
    for name in names:
        events = found.Histograms(f"p-weights/unit_norms/{name}")
        assert [event.step for event in events] == steps
        for event in events:
            (step,) = [step for step in net.steps if step.batch == event.step]
            norms, told = rows_of(name, step.before[name]), event.histogram_value
            expected = [len(norms), norms.min(), norms.max(), norms.sum(), norms.square().sum()]
            # Norms of at most 36 float32 entries: some 1e-7 of themselves each, twice that squared.
            given = [told.num, told.min, told.max, told.sum, told.sum_squares]
            assert given == pytest.approx([float(e) for e in expected], rel=1e-6)


def test_without_a_logger_that_takes_histograms() -> None:
    """It is said, with the loggers that there are, and the curves are logged all the same."""
    run = trainer(WeightNormMonitor(histograms=True))
    with pytest.warns(UserWarning, match=r"needs a logger whose .* The Trainer's are: RecordingLogger. No histograms"):
        run.fit(Net(sgd()), loader())
    assert "weights/weight_norm/up.weight" in run.callback_metrics


def test_units_that_are_not_finite_are_no_part_of_histograms(tmp_path: Path) -> None:
    """TensorBoard refuses them, and empty ones; the other units of the weight are shown."""
    logger = TensorBoardLogger(tmp_path)
    broken = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    write_histograms(logger, {"some": broken, "none": broken[1::2], "empty": broken[:0]}, 0)
    logger.finalize("success")
    found = accumulated(logger.log_dir)
    assert found.Tags()["histograms"] == ["some"]
    told = found.Histograms("some")[0].histogram_value
    assert (told.num, told.min, told.max) == (2, 1.0, 3.0)


class Own(Net):
    """With hyperparameters of its own, and decay groups."""

    def __init__(self, width: int = 3, **others: Any) -> None:
        super().__init__(sgd())
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        """Nesterov, with a warm-up that starts at a tenth."""
        optimizer = torch.optim.SGD(decay_groups(self, 0.1), lr=0.02, momentum=0.9, nesterov=True)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)]


def told(folder: Path) -> dict[str, Any]:
    """Hyperparameters of a run, as TensorBoard reads them."""
    content = accumulated(folder).PluginTagToContent("hparams")[metadata.SESSION_START_INFO_TAG]
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in found.items()}


OURS = {
    "normreg/optimizer": "SGD",
    "normreg/scale_exponent": 2,
    "normreg/lr": 0.02,
    "normreg/momentum": 0.9,
    "normreg/nesterov": True,
    "normreg/weight_decay/weight": 0.1,
    "normreg/weight_decay/gamma": 0.0,
    "normreg/weight_decay/beta": 0.0,
    "normreg/weight_decay/bias": 0.0,
    "normreg/radius": "2.0",
}


def test_hyperparameters_beside_the_users_own(tmp_path: Path) -> None:
    """The learning rate is the schedule's, not that of its first step. The user's run and its file are as ever.

    The file is what a model is loaded with again: one that takes any keyword would get ours.
    """
    tensorboard, table = TensorBoardLogger(tmp_path, "t"), CSVLogger(tmp_path, "c")
    callbacks = WeightNormMonitor(), EffectiveLRMonitor(), NormProjection(2.0)
    trainer(*callbacks, logger=[tensorboard, table]).fit(Own(), loader())
    folder = Path(tensorboard.log_dir)
    assert told(folder) == {"width": 3}
    assert told(folder / "normreg") == {"width": 3} | OURS
    for logger in (tensorboard, table):
        assert yaml.safe_load((Path(str(logger.log_dir)) / "hparams.yaml").read_text()) == {"width": 3}


def test_hyperparameters_of_loggers_that_merge() -> None:
    """Those that are known to get ours once; any other might replace what it has, and is left alone."""

    class Keeping(RecordingLogger):
        def log_hyperparams(self, params: Any) -> None:
            self.given = [*getattr(self, "given", []), params]

    class WandbLogger(Keeping):
        pass

    known, other = WandbLogger(), Keeping()
    callbacks = WeightNormMonitor(), EffectiveLRMonitor(), NormProjection(2.0)
    trainer(*callbacks, logger=[known, other]).fit(Own(), loader())
    assert known.given == [{"width": 3}, OURS]
    assert other.given == [{"width": 3}]


class Blocks(Net):
    """Many layers, each with its BatchNorm."""

    def __init__(self, layers: int) -> None:
        super().__init__(sgd(weight_decay=0.1))
        blocks = [nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)) for _ in range(layers - 1)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(2, 3)
        del self.conv1, self.norm1, self.up, self.norm2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.blocks(x).mean(dim=(2, 3)))

    def configure_optimizers(self) -> Any:
        """One group."""
        return self.make([{"params": self.parameters(), "lr": 0.01}])


def verdict_of(layers: int) -> dict[str, Any]:
    """That of a net with one block, for each block; to probe many takes seconds."""
    found = find_scale_invariance(Blocks(2), next(iter(loader())))
    block = {name: v for name, v in found.items() if name.startswith("blocks.0.")}
    return verdict_to_dict(
        {name.replace(".0.", f".{n}.", 1): v for n in range(layers - 1) for name, v in block.items()}
        | {name: v for name, v in found.items() if name not in block}
    )


@pytest.mark.slow
def test_two_hundred_layers_do_not_flood_a_page(tmp_path: Path) -> None:
    """Of 8 layers 11 curves each, and 12 summaries, for any number of layers above 32; 8 histograms; one text."""
    logger = TensorBoardLogger(tmp_path)
    verdict = verdict_of(200)
    monitors = WeightNormMonitor(histograms=True, invariance=verdict), EffectiveLRMonitor(invariance=verdict)
    trainer(*monitors, NormSummary(verdict), logger=logger, max_steps=2).fit(Blocks(200), loader())
    tags = accumulated(logger.log_dir).Tags()
    ours = [tag for tag in tags["scalars"] if tag not in ("epoch", "hp_metric")]
    assert len(ours) <= 8 * 11 + 4 * 3
    assert len([tag for tag in ours if tag.startswith("weights/effective_lr/")]) >= 7
    assert len(tags["histograms"]) == 8
    assert [tag for tag in tags["tensors"] if "norm_summary" in tag] == ["norm_summary/text_summary"]
