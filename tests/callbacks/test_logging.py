"""Where values go: which steps, which loggers, which layers."""

from __future__ import annotations

import csv
import re
from typing import Any

import lightning.pytorch as other_namespace
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn

from lightning_normreg import CorrectedDecay, EffectiveLRMonitor, NormProjection, NormSummary, WeightNormMonitor
from lightning_normreg._metrics import CURVES, STATISTICS, split_tag
from tests.harness import Net, RecordingLogger, images, loader, sgd, trainer


def steps_of(run: Trainer, tag: str) -> list[int]:
    """The x of a tag's points."""
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    return [step for step, _ in logger.curves(tag)]


@pytest.mark.parametrize(
    "every, interval, expected",
    [(None, 3, [0, 2, 5, 8, 11]), (4, 3, [0, 3, 7, 11]), (None, 1, list(range(12))), (None, 0, [])],
)
def test_first_update_then_every_n(every: int | None, interval: int, expected: list[int]) -> None:
    """The first update, then the Trainer's interval or the monitor's own; interval 0 logs nothing."""
    run = trainer(EffectiveLRMonitor(every), log_every_n_steps=interval, max_epochs=2)
    run.fit(Net(sgd()), loader())
    assert steps_of(run, "weights/effective_lr/up.weight") == expected


def test_epoch_interval_logs_means() -> None:
    """The mean over the logged steps of each epoch, where ``self.log`` puts its own."""
    step, epoch = WeightNormMonitor(exclude=["up.*"]), WeightNormMonitor(logging_interval="epoch")
    run = trainer(step, epoch, max_epochs=2)
    run.fit(Net(sgd()), loader())
    means = epoch.history()
    assert means["step"].tolist() == [5, 11]
    assert means["epoch"].tolist() == [0, 1]
    tag = "weights/weight_norm/conv1.weight"
    expected = step.history().groupby("epoch")[tag].mean()
    # A running mean of 6 float64 values.
    assert means[tag].tolist() == pytest.approx(expected.tolist(), rel=1e-14)


def test_every_curve_of_the_table_is_logged_and_no_other() -> None:
    """Tags are the table of curves times the layers, and the summaries.

    Those of control and of sets are not there, nor what only decoupled decay has; spikes come with the 11th step.
    """
    monitor = EffectiveLRMonitor(gradient=True, scale_exponent=True, also=["radial"])
    run = trainer(WeightNormMonitor(), monitor, max_epochs=4)
    run.fit(Net(sgd(weight_decay=0.1)), loader())
    keys = {c.key for c in CURVES if c.of == "parameter"}
    keys -= {
        "planned_norm",
        "planned_rotation",
        "rotation_factor",
        "rotation_unrounded",
        "set_share",
        "radial_share_decay",
        "radial_share_gradient",
    }
    invariant = {f"weights/{key}/{n}" for key in keys if "not" not in key for n in ("conv1.weight", "up.weight")}
    others = {key for key in keys if key != "effective_lr" and not key.startswith("equilibrium")}
    layers = invariant | {f"weights/{key}/head.weight" for key in others}
    summaries = {f"weights/layers/{c.summary}_{s}" for c in CURVES if c.summary for s in STATISTICS}
    logger = run.logger
    assert isinstance(logger, RecordingLogger)
    groups = {"weights/timescale/0", "weights/timescale/1"}
    assert {tag for _, row in logger.rows for tag in row} == layers | summaries | groups
    assert layers | summaries <= set(run.callback_metrics)


class Deep(LightningModule):
    """Many small layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Any loss."""
        return self.layers(batch[0].flatten(1)[:, :2]).square().mean()

    def configure_optimizers(self) -> Any:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize(
    "depth, per_layer, shown",
    [(32, "auto", 32), (33, "auto", 8), (33, True, 33), (3, False, 0)],
)
def test_many_layers_are_shown_as_summaries_and_eight(
    depth: int, per_layer: Any, shown: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Up to 32 all of them; above that eight over the whole depth, said once, with all layers in the summaries."""
    monitor = WeightNormMonitor(per_layer=per_layer)
    run = trainer(monitor)
    with caplog.at_level("INFO"):
        run.fit(Deep(depth), loader())
    curves = [
        c.removeprefix("weights/weight_norm/") for c in run.callback_metrics if c.startswith("weights/weight_norm/")
    ]
    assert len(curves) == shown
    said = [r for r in caplog.records if "Use per_layer=True for all curves" in r.getMessage()]
    assert len(said) == (depth > 32 and per_layer == "auto")
    assert "weights/layers/unit_norm_rms_median" in run.callback_metrics
    if shown:
        assert curves[0] == "layers.0.weight"
        assert curves[-1] == f"layers.{depth - 1}.weight"


def test_progress_bar_shows_the_median_effective_lr() -> None:
    """One number, that of the last logged step; loggers, curves and history are as without it."""
    runs = {}
    for shown in (False, True):
        monitor = EffectiveLRMonitor(progress_bar=shown)
        run = trainer(monitor, max_epochs=2)
        torch.manual_seed(0)
        run.fit(Net(sgd()), loader())
        assert isinstance(run.logger, RecordingLogger)
        runs[shown] = (run.logger.rows, monitor.history())
        rates = [monitor.history()[f"weights/effective_lr/{name}.weight"].iloc[-1] for name in ("conv1", "up")]
        # Lightning keeps it in float32.
        expected = {"effective_lr": pytest.approx(sum(rates) / 2, rel=1e-6)} if shown else {}
        assert {k: v for k, v in run.progress_bar_metrics.items() if k != "v_num"} == expected
    assert runs[True][0] == runs[False][0]
    assert runs[True][1].equals(runs[False][1])


def test_without_a_logger_values_are_still_there() -> None:
    """One warning, then ``callback_metrics`` and the history have them; early stopping can watch them."""
    monitor = EffectiveLRMonitor()
    stop = EarlyStopping("weights/rotation/head.weight", patience=1, stopping_threshold=0.0, mode="max",
                         check_on_train_epoch_end=True)  # fmt: skip
    run = trainer(monitor, stop, logger=False, max_epochs=5)
    with pytest.warns(UserWarning, match="has no logger, so the curves of EffectiveLRMonitor go to"):
        run.fit(Net(sgd()), loader())
    assert run.current_epoch == 1
    frame = monitor.history()
    assert len(frame) == 6
    assert frame["weights/rotation/head.weight"].iloc[-1] == run.callback_metrics["weights/rotation/head.weight"].item()


@pytest.mark.pitfall(16)
def test_tensorboard_layout_shows_all_layers_in_one_chart(tmp_path: Any) -> None:
    """One layout for both monitors, its regexes match the tags of all layers, and the user's own layout stands."""
    logger = TensorBoardLogger(tmp_path, prefix="my.run")
    logger.experiment.add_custom_scalars({"mine": {"loss": ["Multiline", ["loss"]]}})
    run = trainer(WeightNormMonitor(), EffectiveLRMonitor(), logger=logger)
    run.fit(Net(sgd(weight_decay=0.1)), loader())
    own = EventAccumulator(str(logger.log_dir)).Reload()
    tags = own.Tags()["scalars"]
    assert len(own.Scalars("my.run-weights/effective_lr/up.weight")) == 6

    written = EventAccumulator(f"{logger.log_dir}/normreg").Reload()
    events = written.Tensors("custom_scalars__config__")
    assert len(events) == 1
    layout = layout_pb2.Layout.FromString(events[0].tensor_proto.string_val[0])
    charts = {chart.title: chart for chart in layout.category[0].chart}
    (regex,) = charts["effective learning rate"].multiline.tag
    matched = [tag for tag in tags if re.match(regex, tag)]  # as TensorBoard does
    assert matched == [f"my.run-weights/effective_lr/{n}.weight" for n in ("conv1", "up")]
    (regex,) = charts["effective learning rate, layers that are not scale-invariant"].multiline.tag
    assert [tag for tag in tags if re.match(regex, tag)] == ["my.run-weights/effective_lr_not_invariant/head.weight"]
    margin = charts["rotation per step, all layers"].margin.series[0]
    # The page takes these as they are, and would escape a regex.
    assert [margin.value, margin.lower, margin.upper] == [
        f"my.run-weights/layers/rotation_{s}" for s in ("median", "min", "max")
    ]
    assert {name for c in charts.values() for s in c.margin.series for name in (s.value, s.lower, s.upper)} < set(tags)
    (mine,) = own.Tensors("custom_scalars__config__")
    assert layout_pb2.Layout.FromString(mine.tensor_proto.string_val[0]).category[0].title == "mine"


@pytest.mark.parametrize("prefix, start", [("critic", "critic/"), ("a/b", "a/b/"), ("", "")])
def test_a_prefix(prefix: str, start: str, tmp_path: Any) -> None:
    """Of every tag, and of TensorBoard's layout."""
    logger = TensorBoardLogger(tmp_path)
    monitors = [kind(prefix=prefix) for kind in (WeightNormMonitor, EffectiveLRMonitor)]
    trainer(*monitors, logger=[logger]).fit(Net(sgd()), loader())
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    assert {f"{start}weight_norm/up.weight", f"{start}layers/rotation_max"} < set(tags)
    assert {found[0] for found in map(split_tag, tags) if found} == {prefix}
    written = EventAccumulator(f"{logger.log_dir}/normreg").Reload().Tensors("custom_scalars__config__")
    chart = layout_pb2.Layout.FromString(written[0].tensor_proto.string_val[0]).category[0].chart[0]
    assert [tag for tag in tags if re.match(chart.multiline.tag[0], tag)] == [
        f"{start}effective_lr/{name}.weight" for name in ("conv1", "up")
    ]


def test_two_monitors_of_gradients_have_each_their_own() -> None:
    """Of different weights, in one run, as each alone."""

    def rows(*includes: str) -> list[dict[str, float]]:
        monitors = [EffectiveLRMonitor(include=[glob], gradient=True) for glob in includes]
        run = trainer(*monitors)
        torch.manual_seed(0)
        run.fit(Net(sgd()), loader())
        frames = [m.history().filter(like="gradient") for m in monitors]
        return [dict(zip(f.columns, f.iloc[-1], strict=True)) for f in frames]

    first, second = rows("conv1.weight", "up.weight")
    assert first.keys() == {f"weights/gradient_{what}/conv1.weight" for what in ("norm", "alignment")}
    assert [first] == rows("conv1.weight")
    assert [second] == rows("up.weight")


def test_sums_of_a_checkpoint_of_before_the_first_release() -> None:
    """Its tags are those of that time; what comes with them goes on under the present ones."""
    monitor = EffectiveLRMonitor(logging_interval="epoch")
    state = monitor.state_dict()
    monitor.load_state_dict(
        state | {"sums": {"angular_update/a.weight": (0.3, 2), "layers/angular_update_max": (1, 2)}}
    )
    assert monitor.state_dict()["sums"] == {
        "weights/rotation/a.weight": (0.3, 2),
        "weights/layers/rotation_max": (1, 2),
    }


def test_csv_and_several_loggers(tmp_path: Any) -> None:
    """Each logger gets the same rows."""
    recording, table = RecordingLogger(), CSVLogger(tmp_path)
    run = trainer(EffectiveLRMonitor(), logger=[table, recording])
    run.fit(Net(sgd()), loader())
    with open(f"{table.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["weights/effective_lr/up.weight"]]
    assert [float(r["weights/effective_lr/up.weight"]) for r in rows] == [
        v for _, v in recording.curves("weights/effective_lr/up.weight")
    ]


def test_a_logger_with_its_own_separator() -> None:
    """Tags take the logger's separator between prefix, quantity and parameter."""

    class Dashes(RecordingLogger):
        group_separator = "-"

    run = trainer(WeightNormMonitor(), logger=Dashes())
    run.fit(Net(sgd()), loader())
    assert steps_of(run, "weights-weight_norm-up.weight") == list(range(6))


@pytest.mark.pitfall(25)
def test_lightning_replaces_no_attribute_of_a_callback() -> None:
    """It gives each of them methods of the module, whatever they had under these names."""
    callbacks = [WeightNormMonitor(), EffectiveLRMonitor(), NormProjection(), CorrectedDecay(), NormSummary()]
    own = [set(dir(callback)) for callback in callbacks]
    net = Net(sgd(weight_decay=0.1))
    trainer(*callbacks).fit(net, loader())
    for callback, names in zip(callbacks, own, strict=True):
        given = {name for name, value in vars(callback).items() if getattr(value, "__self__", None) is net}
        assert given == {"log", "log_dict"}
        assert not given & names


def test_fast_dev_run_and_all_zero_layers() -> None:
    """One batch with a dummy logger; a weight of zeros has no effective rate yet, which is said."""
    net = Net(sgd())
    with torch.no_grad():
        net.head.weight.zero_()
    run = trainer(EffectiveLRMonitor(), fast_dev_run=True)
    with pytest.warns(UserWarning, match="1 units of 'head.weight' are zero"):
        run.fit(net, loader())
    assert "weights/effective_lr_not_invariant/head.weight" not in run.callback_metrics
    assert run.callback_metrics["weights/rotation/head.weight"].item() == 0.0


def test_the_other_namespace() -> None:
    """The same classes work in ``lightning.pytorch``'s Trainer."""

    class Other(other_namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(72, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    monitor = EffectiveLRMonitor()
    run = other_namespace.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor, NormProjection(include=["layer.weight"], unit="neuron", on_not_invariant="allow")],
    )
    with pytest.warns(UserWarning, match="has no logger"):
        run.fit(Other(), torch.utils.data.DataLoader(images(8), batch_size=4))
    assert run.callback_metrics["weights/effective_lr_not_invariant/layer.weight"].item() == pytest.approx(
        1e-3 / 3**0.5, rel=1e-6
    )
    assert len(monitor.history()) == 2
