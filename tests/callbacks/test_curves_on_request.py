"""Curves that are logged on request, and those of groups and of spikes, against what the steps were."""

from __future__ import annotations

import copy
import io
import math
import statistics
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.optim import SGD, AdamW

from lightning_normreg import EffectiveLRMonitor
from tests.callbacks.sets import DECAY, LR, Stream, angle, fitted, samples
from tests.symmetries._small_models import WORDS

pytestmark = pytest.mark.filterwarnings("ignore:The Trainer has no logger")  # the history is read instead


def run(make: Any = AdamW, seed: int = 0, **options: Any) -> tuple[Stream, list[dict[str, Any]], Trainer]:
    """Steps as they were, and as they were logged."""
    torch.manual_seed(seed)
    model = Stream(depth=1, make=make).double()
    every = options.pop("every_n_steps", 1)
    monitor = EffectiveLRMonitor(every_n_steps=every, symmetries=None, also=["radial", "rows"])
    trainer = fitted(model, monitor, **options)
    return model, monitor.history().to_dict("records"), trainer


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_radial_part_is_split_into_decay_and_gradient(seed: int) -> None:
    """Along the weight, over the length of the update; with one unit per weight, as no weight is invariant here."""
    model, rows, _ = run(seed=seed)
    for (before, after), row in zip(model.steps, rows, strict=True):
        for name in ("net.blocks.0.q.weight", "net.embed.weight"):
            w, update = before[name].flatten(), (after[name] - before[name]).flatten()
            share = float(w @ update / w.norm() / update.norm())
            decay = float(-LR * DECAY * w.norm() / update.norm())
            # A sum over hundreds of entries that cancels in part: relative to 1.
            assert row[f"weights/radial_share/{name}"] == pytest.approx(share, abs=1e-12)
            assert row[f"weights/radial_share_decay/{name}"] == pytest.approx(decay, rel=1e-12)
            assert row[f"weights/radial_share_gradient/{name}"] == pytest.approx(share - decay, abs=1e-12)


def test_of_decay_in_the_gradient_nothing_is_split() -> None:
    """Momentum remembers it: the whole is logged, the parts are not."""
    _, rows, _ = run(SGD)
    assert any("radial_share/" in tag for tag in rows[0])
    assert not any("radial_share_decay/" in tag for tag in rows[0])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_are_parted_by_how_often_they_were_looked_up(every: int, seed: int) -> None:
    """Since the last logged step; counted here in the batches themselves, rows turned one by one."""
    model, rows, _ = run(seed=seed, every_n_steps=every)
    batches = list(samples())
    done = 0
    for row in rows:
        step = int(row["step"])
        words = torch.cat([batch.flatten() for batch in batches[done : step + 1]])
        counts = torch.bincount(words, minlength=WORDS).tolist()
        done = step + 1
        before, after = (w["net.embed.weight"] for w in model.steps[step])
        turned = [angle(a, b) for a, b in zip(before, after, strict=True)]
        seen = sorted(c for c in counts if c)
        usual = seen[(len(seen) - 1) // 2]
        classes: dict[str, Any] = {
            "never": lambda c: c == 0,
            "seldom": lambda c, usual=usual: 0 < c <= usual,
            "often": lambda c, usual=usual: c > usual,
        }
        for word, belongs in classes.items():
            squares = [t**2 for t, c in zip(turned, counts, strict=True) if belongs(c)]
            logged = row.get(f"weights/rotation_{word}/net.embed.weight", math.nan)
            if squares:
                assert logged == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-9)
            else:
                assert math.isnan(logged)
    model(batches[0])  # counters are off again
    assert not model.net.embed._forward_pre_hooks


class Kept(Stream):
    """Copied and saved in the middle of a run, and used: the copy looks up one word many times."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """With the module's hooks on."""
        super().on_before_optimizer_step(optimizer)
        file = io.BytesIO()
        torch.save(self.net, file)
        file.seek(0)
        for other in (copy.deepcopy(self.net), torch.load(file, weights_only=False)):
            other(torch.zeros(50, 5, dtype=torch.long))


def test_copies_of_an_embedding_are_not_counted() -> None:
    """Nor do counters keep a module from being saved: the curves are those of a run without copies."""
    histories = []
    for kind in (Stream, Kept):
        torch.manual_seed(0)
        monitor = EffectiveLRMonitor(every_n_steps=1, symmetries=None, also=["rows"])
        fitted(kind(depth=1), monitor)
        histories.append(monitor.history())
    assert "weights/rotation_often/net.embed.weight" in histories[0]
    assert histories[0].equals(histories[1])


def test_the_timescale_of_decay_is_a_share_of_the_run() -> None:
    """1/(lr·decay) = 1000 steps, of 4 planned ones; heavy ball repeats what decay takes off 1/(1 − β) times."""
    for make, gain in ((AdamW, 1.0), (lambda *a, **k: SGD(*a, momentum=0.9, **k), 10.0)):
        _, rows, _ = run(make)
        assert [row["weights/timescale/0"] for row in rows] == pytest.approx([1 / (LR * DECAY * gain) / 4] * 4)
    _, rows, _ = run(lambda p, lr, weight_decay: torch.optim.Adam(p, lr, weight_decay=weight_decay))
    assert "weights/timescale/0" not in rows[0]


class Spiking(Stream):
    """One batch of many pulls a hundred times as hard."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Scaled."""
        return super().training_step(batch, batch_idx) * (100.0 if batch_idx == 13 else 1.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_spike_is_told_once(seed: int) -> None:
    """Against the median of the last steps; a schedule of the learning rate makes none."""
    torch.manual_seed(seed)
    model = Spiking(depth=1, make=SGD)
    monitor = EffectiveLRMonitor(every_n_steps=1, symmetries=None)
    with pytest.warns(UserWarning, match=r"In a step net\.\S+ .* and 6 more turned up to \S+ times as far") as told:
        fitted(model, monitor, loader=samples(count=160))
    assert sum("times as far" in str(w.message) for w in told) == 1
    spikes = monitor.history()["weights/layers/rotation_spike_max"].tolist()
    assert all(math.isnan(spike) for spike in spikes[:10])
    assert max(spikes[10:13]) < 5
    assert spikes[13] > 20
    history = monitor.history()
    for step in range(10, len(spikes)):  # from the logged rotations and rates themselves
        ratios = []
        for tag in (tag for tag in history if tag.startswith("weights/rotation/")):
            rates = history[tag.replace("/rotation/", "/effective_lr_not_invariant/")]
            sizes = (history[tag] / rates).tolist()
            ratios.append(sizes[step] / statistics.median(sizes[max(0, step - 20) : step]))
        found = [history[f"weights/layers/rotation_spike_{what}"][step] for what in ("min", "median", "max")]
        assert found == pytest.approx([min(ratios), statistics.median(ratios), max(ratios)], rel=1e-5)


class Narrow(Stream):
    """In bfloat16."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """In float32 from the logits on."""
        logits = self(batch)[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())


@pytest.mark.parametrize("lr", [1e-2, 1e-5])
def test_rotation_without_rounding(lr: float) -> None:
    """Of the first step, in which AdamW's is w ← (1 − ηλ)w − ηg/(|g| + ε), beside what bfloat16 leaves of it.

    At 1e-5 all updates but those of tiny entries are lost. Float32 rounds each entry by up to 6e-8 of it, and so does
    the rotation.
    """
    torch.manual_seed(0)
    model = Narrow(depth=1, make=lambda p, **_: AdamW(p, lr=lr, weight_decay=DECAY)).bfloat16()
    monitor = EffectiveLRMonitor(every_n_steps=1, symmetries=None, also=["rounding"], on_unhealthy="ignore")
    fitted(model, monitor)
    row: dict[str, Any] = monitor.history().iloc[0].to_dict()
    (before, after), found = model.steps[0], model.gradients[0]
    for name in ("net.blocks.0.q.weight", "net.head.weight"):
        w, g = before[name], found[name]
        expected = angle(w.flatten(), (w * (1 - lr * DECAY) - lr * g / (g.abs() + 1e-8)).flatten())
        assert row[f"weights/rotation_unrounded/{name}"] == pytest.approx(expected, abs=6e-8, rel=1e-6)
        assert row[f"weights/rotation/{name}"] == pytest.approx(angle(w.flatten(), after[name].flatten()), rel=1e-5)
        lost = row[f"weights/rotation/{name}"] / expected
        assert lost < 0.5 if lr < 1e-4 else 0.9 < lost < 1.1
    assert row.keys() == monitor.history().iloc[-1].to_dict().keys()


def test_looking_without_rounding_changes_nothing() -> None:
    """The run is bit for bit the one without."""
    ends = []
    for also in ([], ["rounding"]):
        torch.manual_seed(0)
        model = Narrow(depth=1).bfloat16()
        fitted(model, EffectiveLRMonitor(every_n_steps=1, symmetries=None, also=also, on_unhealthy="ignore"))  # type: ignore[arg-type]
        ends.append(model.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


class Around(torch.optim.Optimizer):
    """Steps the optimizer inside of it, as lookahead does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """The inner one's."""
        return self.inner.step(closure)


def test_of_a_wrapper_the_inner_step_alone_is_tried() -> None:
    """Its own step would move the weights a second time: they are bit for bit those of a run without looking."""
    ends = []
    for also in ([], ["rounding"]):
        torch.manual_seed(0)
        model = Narrow(depth=1, make=lambda p, **_: Around(AdamW(p, lr=LR))).bfloat16()
        monitor = EffectiveLRMonitor(every_n_steps=1, symmetries=None, also=also, on_unhealthy="ignore")  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match="is not known"):
            fitted(model, monitor)
        ends.append(model.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
