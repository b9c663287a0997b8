"""The table before training says of each parameter what other parts of the package find."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_normreg import NormProjection, NormSummary, decay_groups
from tests.callbacks.test_verdict import Any2d, fit_plain, layer_norm
from tests.harness import Net, loader, sgd, trainer


class Grouped(Net):
    """Only weights decay; lr 0.01."""

    def configure_optimizers(self) -> Any:
        """SGD on decay groups."""
        return torch.optim.SGD(decay_groups(self, 0.1), lr=0.01)


def summary(net: Any, *callbacks: Any, **options: Any) -> NormSummary:
    """The callback after a run."""
    found = NormSummary()
    trainer(found, *callbacks, **options).fit(net, loader())
    return found


def test_rows_agree_with_norms_groups_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    """Norms from before the projection though it comes later in the list, radii, groups and roles."""
    net = Grouped(sgd())
    start = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    found = summary(net, NormProjection(2.0), max_epochs=2)
    rows = {row["parameter"]: row for row in found.rows()}
    assert list(rows) == [name for name, _ in net.named_parameters()]
    conv, head, gain = rows["conv1.weight"], rows["head.weight"], rows["norm1.weight"]
    assert conv["norm"] == pytest.approx(start["conv1.weight"].norm().item() / math.sqrt(6), rel=1e-6)
    assert (conv["radius"], conv["units"], conv["evidence"]) == (2.0, "each neuron", "float64")
    assert head["norm"] == pytest.approx(start["head.weight"].norm().item(), rel=1e-6)
    assert (head["radius"], head["units"], head["weight_decay"]) == (None, "none", 0.1)
    assert (gain["role"], gain["group"], gain["weight_decay"], gain["optimizer"]) == ("gamma", "gamma", 0.0, "SGD")
    assert json.loads(json.dumps(found.rows()))
    printed = capsys.readouterr().out
    assert printed.count("Before training") == 1
    # The head's decay is that of the gain and shift in front of it, as in the paper's closing remark; rows of
    # convolutions are scale-invariant by themselves.
    assert "like decay of 0.1 on 2 tensors (norm2.weight, norm2.bias)" in " ".join(printed.split())
    assert (conv["acts"], head["acts"]) == ("schedule", "acts through norm2.weight, norm2.bias")
    assert (conv["removable"], head["removable"], gain["removable"]) == (True, True, None)


def test_sentences_have_the_right_numbers() -> None:
    """Share of decayed entries that is scale-invariant, the decay's timescale in steps and epochs, and clipping."""
    found = summary(Grouped(sgd()), gradient_clip_val=0.5, accumulate_grad_batches=2)
    invariant, rest = 6 * 2 * 9 + 6 * 2 * 9, 3 * 4
    assert found.sentences() == [
        f"{invariant / (invariant + rest):.0%} of what you decay is scale-invariant: there decay only sets the "
        "learning rate.",
        "Scale-invariant together: norm1.weight, norm1.bias.",
        "Only the product counts of what may grow against what shrinks: norm2.weight, norm2.bias against head.weight "
        "(each of 4 blocks).",
        "Decay of 0.1 on 3 tensors trains this network like decay of 0.1 on 2 tensors (norm2.weight, norm2.bias); the "
        "rest of it is a learning-rate schedule.",
        "With these gains decayed by 0.1 as well it would be 2 times as much.",
        "At lr 0.01 and decay 0.1 it acts over 1/(lr·decay) = 1e+03 steps, 333 epochs, 333 of the run at this learning "
        "rate.",
        "Gradients are clipped at 0.5: where that is active, a step no longer grows with them.",
    ]


def test_nothing_invariant_and_nothing_decayed() -> None:
    """Both are said in words; a bias that belongs to the unit is named."""
    found = NormSummary()
    fit_plain(found)
    assert found.sentences()[0].startswith("No parameter is scale-invariant by itself")
    found = summary(layer_norm())
    assert {row["parameter"]: row["units"] for row in found.rows()}[
        "layers.1.weight"
    ] == "whole tensor, with layers.1.bias"
    assert found.sentences()[0].startswith("Nothing is decayed, so the norms of scale-invariant weights grow")


def test_frozen_parameters_and_text_for_the_logger(tmp_path: Any) -> None:
    """A parameter that no optimizer updates has no group; TensorBoard gets the table as text."""
    net = Any2d(torch.nn.Conv2d(2, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.Flatten(), torch.nn.Linear(96, 3))
    net.layers[0].requires_grad_(False)
    logger = TensorBoardLogger(tmp_path)
    net.configure_optimizers = lambda: torch.optim.SGD(net.layers[3].parameters(), lr=0.1)  # type: ignore[method-assign]
    found = summary(net, logger=logger)
    assert found.rows()[0]["group"] == found.rows()[0]["optimizer"] == ""
    logger.experiment.flush()
    events = EventAccumulator(str(logger.log_dir)).Reload().Tensors("norm_summary/text_summary")
    assert "layers.3.weight" in events[0].tensor_proto.string_val[0].decode()
