"""Plans from plain numbers and modules: closed forms, refusals in words, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normreg import Plan, find_scale_invariance, find_symmetries, functional, plan, plot_curves
from lightning_normreg._reports import Comparison, factor_for
from tests import twins

ADAM: dict[str, Any] = {"optimizer": "AdamW", "lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.5}
SAME = 0.01
"""Neighbouring learning rates within 1 % are integrated as one stretch, at their mean."""


def cosine(steps: int) -> list[float]:
    """Warm-up of 50 steps, and down to 0."""
    return [min(1.0, (s + 1) / 50) * (1 + math.cos(math.pi * s / steps)) / 2 for s in range(steps)]


def test_without_decay_squares_of_steps_add_up() -> None:
    """N² grows by C·lr² per step: weights of an average sum up to 1, so a walk with momentum is as long as without."""
    steps = 1200
    schedule = cosine(steps)
    for optimizer in ("AdamW", "Adam"):
        found = plan({"w": (0.3, 100)}, ADAM | {"optimizer": optimizer, "weight_decay": 0.0}, schedule)
        squares = [0.3**2]
        for factor in schedule:
            squares.append(squares[-1] + 100 * (2e-3 * factor) ** 2)
        expected = [math.sqrt(squares[step]) for step in found.at]
        assert found.units["w"].norm == pytest.approx(expected, rel=SAME)
        assert found.units["w"].timescale == math.inf
        assert math.isnan(found.units["w"].equilibrium_norm[5])


def test_a_constant_rate_settles_as_the_exponential_says() -> None:
    """The square of the norm comes to ηC/(2λ) as e^(−2ηλt), to ηλ(1 + 1/(1 − β)) = 1.1 %, next order and memory."""
    start, entries, steps = 2.0, 400, 3000
    found = plan({"w": (start, entries)}, ADAM, [1.0] * steps).units["w"]
    at = plan({"w": (start, entries)}, ADAM, [1.0] * steps).at
    settled = 2e-3 * entries / (2 * 0.5)
    squares = [settled + (start**2 - settled) * math.exp(-2 * 1e-3 * step) for step in at]
    assert [n**2 for n in found.norm] == pytest.approx(squares, rel=0.011)
    assert found.equilibrium_norm[-1] ** 2 == pytest.approx(settled, rel=0.011)
    assert found.rotation[-1] == pytest.approx(math.sqrt(2 * 1e-3 * 0.1 / 1.9), rel=0.011)
    assert found.relaxed[-1] == pytest.approx(2 * 1e-3 * at[-1], rel=2e-3)
    assert found.timescale == pytest.approx(1 / (1e-3 * steps))
    assert found.effective_lr == pytest.approx([2e-3 / n for n in found.norm])


def test_sentences_say_when_and_how_much() -> None:
    """Balance after 3 relaxation times, 3/(2·lr·decay) steps; a decay that does nothing; a rotation that peaks."""
    said = " ".join(plan({"w": (2.0, 400)}, ADAM, [1.0] * 4000).sentences())
    assert said.startswith("Planned: w.")
    assert "reaches balance at about step 1 500" in said
    assert "does next to nothing" in " ".join(
        plan({"w": (2.0, 400)}, ADAM | {"weight_decay": 1e-4}, [1.0] * 4000).sentences()
    )
    assert "too long to reach balance: 1.0 of the 3" in " ".join(plan({"w": (2.0, 400)}, ADAM, [1.0] * 500).sentences())
    small = plan({"w": (0.3, 400)}, ADAM, [1.0] * 4000)
    ratio = functional.predicted_rotation("adam_decoupled", 0.3, lr=2e-3, weight_decay=0.5, entries=400) / (
        functional.equilibrium_rotation("adam_decoupled", lr=2e-3, weight_decay=0.5)
    )
    assert f"peaks at {ratio:.1f} times its equilibrium, at about step 0" in " ".join(small.sentences())


@pytest.mark.parametrize(
    "recipe, steps, why",
    [
        ({"optimizer": "SGD", "lr": 0.1, "weight_decay": 0.01}, 500, "size of gradients, .* turns by 0.045 a step"),
        ({"optimizer": "Adam", "lr": 0.1, "weight_decay": 0.01}, 5000, "size of gradients"),
        ({"optimizer": "lion_pytorch.Lion", "lr": 1e-3, "weight_decay": 0.01}, 500, "is signal"),
        ({"optimizer": "Muon", "lr": 1e-3, "weight_decay": 0.01}, 500, "is signal"),
        (ADAM | {"amsgrad": True}, 500, "measured for Adam and AdamW alone"),
        ({"optimizer": "NAdam", "lr": 1e-3, "weight_decay": 0.1, "decoupled_weight_decay": True}, 9000, "alone"),
        ({"optimizer": "RAdam", "lr": 1e-3, "weight_decay": 0.1, "decoupled_weight_decay": True}, 9000, "alone"),
        ({"optimizer": "LBFGS", "lr": 1e-3}, 500, "is not known"),
        (ADAM | {"betas": (0.9, 0.999)}, 1999, "1 999 steps is too short against the 1000"),
    ],
)
def test_what_is_refused(recipe: dict[str, Any], steps: int, why: str) -> None:
    """In words, and nothing is drawn of it."""
    found = plan({"w": (1.0, (20, 20))}, recipe, [1.0] * steps)
    assert not found.units
    assert list(found.refused) == ["w"]
    with pytest.raises(AssertionError, match=why):  # the pattern, as pytest has it
        raise AssertionError(found.refused["w"])
    assert found.sentences()[0] == "Nothing of it can be planned."


def test_units_of_several_rows_are_planned_for_two_relaxation_times() -> None:
    """2/(2·lr·decay) = 1000 steps; and not at all where steps are large. One row has no such end."""
    found = plan({"matrix": (2.0, (20, 20)), "row": (2.0, 400)}, ADAM, [1.0] * 3000)
    matrix, row = found.units["matrix"], found.units["row"]
    ends = [step for step, norm in zip(found.at, matrix.norm, strict=True) if math.isfinite(norm)]
    assert max(ends) == pytest.approx(1000, abs=3000 / 119)  # between two of the steps that have numbers
    assert matrix.norm[: len(ends)] == row.norm[: len(ends)]
    assert all(map(math.isfinite, row.norm))
    assert any("matrix is planned up to about step" in words for words in found.sentences())
    assert found.typical_rotation("matrix") < found.typical_rotation("row")  # it turns faster in the end
    compared = Comparison(found)
    assert compared.add(2000, "matrix", 1.0, 1.0, 1.0) == {}
    assert len(compared.add(2000, "row", 1.0, 1.0, 1.0)) == 2
    for more in ({"weight_decay": 0.6}, {"lr": 0.01, "weight_decay": 1e-4}):
        refused = plan({"matrix": (2.0, (20, 20))}, ADAM | more, [1.0] * 3000).refused["matrix"]
        assert "several rows or tensors" in refused


class Stream(nn.Module):
    """A residual stream: embedding and output are a set, the branch's first layer reads; the head is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 8), nn.RMSNorm(8, eps=1e-30)
        self.read, self.write = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.last, self.head = nn.RMSNorm(8, eps=1e-30), nn.Linear(8, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.embed(x)
        h = h + self.write(nn.functional.gelu(self.read(self.norm(h))))
        logits: Tensor = self.head(self.last(h))
        return logits


def _stream() -> tuple[Stream, Any, Any]:
    torch.manual_seed(0)
    net = Stream()
    batch = (torch.randint(7, (8, 5)), torch.randint(7, (8, 5)))

    def loss(m: nn.Module, b: Any) -> Tensor:
        return nn.functional.cross_entropy(m(b[0]).flatten(0, -2), b[1].flatten())

    asked = {"forward": loss, "progress": False}
    return net, find_scale_invariance(net, batch, **asked), find_symmetries(net, batch, **asked)


def test_a_set_is_planned_as_one_unit() -> None:
    """Its norm is that of the concatenation, and the course that of its entries from there; members are refused."""
    net, verdict, symmetries = _stream()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.5)
    found = plan(net, optimizer, cosine(400), invariance=verdict, symmetries=symmetries)
    assert list(found.units) == ["residual_stream"]
    joint = torch.cat([net.embed.weight.flatten(), net.write.weight.flatten()]).double().norm().item()
    assert found.units["residual_stream"].norm[0] == pytest.approx(joint, rel=1e-6)
    alone = plan({"set": (joint, 7 * 8 + 8 * 16)}, ADAM, cosine(400)).units["set"]
    assert found.units["residual_stream"].rotation == pytest.approx(alone.rotation, rel=1e-6)
    assert found.covered == (2, 4)
    assert "only as a part of residual_stream" in found.refused["embed.weight"]
    assert "not scale-invariant" in found.refused["head.weight"]
    two = [{"params": [net.embed.weight], "weight_decay": 0.0}, {"params": [net.write.weight]}]
    apart = plan(net, torch.optim.AdamW(two, lr=2e-3), [1.0] * 2000, invariance=verdict, symmetries=symmetries)
    assert "unequal weight_decay" in apart.refused["residual_stream"]
    basis = [replace(one, eps_share=0.2) for one in symmetries.basis]
    ruled = plan(net, ADAM, cosine(400), invariance=verdict, symmetries=replace(symmetries, basis=tuple(basis)))
    assert "where eps is negligible" in ruled.refused["residual_stream"]
    assert "not scale-invariant by itself" in ruled.refused["embed.weight"]
    assert "No optimizer" in apart.refused["head.weight"]


def test_what_is_not_there() -> None:
    """Arguments that say nothing, in words."""
    with pytest.raises(ValueError, match="`schedule` must have a factor for each step"):
        plan({"w": (1.0, 4)}, ADAM, [])
    with pytest.raises(ValueError, match="`invariance` must be given for a module"):
        plan(nn.Linear(2, 2), ADAM, [1.0])
    with pytest.raises(ValueError, match="`recipe` must have optimizer"):
        plan({"w": (1.0, 4)}, {"lr": 1.0}, [1.0])
    with pytest.raises(ValueError, match="`recipe` must name an optimizer that is known, got 'AdmW'"):
        plan({"w": (1.0, 4)}, {"optimizer": "AdmW", "lr": 1.0}, [1.0])
    zero = plan({"w": (0.0, 4)}, ADAM, [1.0] * 100)
    assert zero.refused["w"].startswith("Its norm at the start is 0")


def test_there_and_back_through_a_file(tmp_path: Path) -> None:
    """Nine digits, and no NaN or infinity in the JSON."""
    found = plan({"a": (1.0, 9), "b": (2.0, 16)}, ADAM | {"weight_decay": 0.0}, [0.0, *cosine(200)])
    found.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    json.loads(text, parse_constant=pytest.fail)
    again = Plan.load(tmp_path / "plan.json")
    assert (again.steps, again.at, again.refused, again.covered) == (201, found.at, {}, (2, 2))
    for name, unit in found.units.items():
        assert again.units[name].norm == pytest.approx(unit.norm, rel=1e-8)
        assert math.isnan(again.units[name].equilibrium_norm[0])
        assert again.units[name].timescale == math.inf
    figure = plot_curves(found.to_frame())
    assert len(figure.axes) == 3
    for content, said in (("{", "plan --save"), ("[]", "got something else"), ('{"units": 3}', "got something else")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            Plan.load(tmp_path / "bad.json")


@pytest.mark.parametrize("goal", [("timescale", 0.2), ("rotation", 0.004)])
@pytest.mark.parametrize("of_decay", [True, False])
def test_factors_give_what_is_asked_for(goal: tuple[str, float], of_decay: bool) -> None:
    """The plan with the factor has it; timescale by hand, as it is inverse to the sum of lr·decay."""

    def build(factor: float) -> Plan:
        key = "weight_decay" if of_decay else "lr"
        return plan({"w": (1.0, 400)}, ADAM | {key: ADAM[key] * factor}, cosine(1000))

    factor = factor_for(goal, build, build(1.0))
    unit = build(factor)
    if goal[0] == "timescale":
        assert factor == pytest.approx(1 / (0.2 * 2e-3 * 0.5 * sum(cosine(1000))), rel=1e-5)
    else:
        assert unit.typical_rotation("w") == pytest.approx(0.004, rel=1e-4)


def test_goals_out_of_reach() -> None:
    """What there is, and why there is nothing."""

    def build(factor: float, decay: float = 0.5) -> Plan:
        return plan({"w": (1.0, 400)}, ADAM | {"weight_decay": decay * factor}, cosine(1000))

    with pytest.raises(ValueError, match=r"within what can be planned it is 0\.00"):
        factor_for(("rotation", 1e-5), build, build(1.0))
    with pytest.raises(ValueError, match="nothing is decayed"):
        factor_for(("timescale", 0.2), lambda factor: build(factor, 0.0), build(1.0, 0.0))


def test_a_run_that_parts_and_one_that_does_not() -> None:
    """Eight of ten logged steps outside, and what of the recipe was another; names of another model."""
    found = plan({"a": (1.0, 400), "b": (1.0, 400)}, ADAM, cosine(1000))
    compared = Comparison(found)
    for step in range(0, 1000, 10):
        for name in "ab":
            unit = {key: found.at_step(name, key, step) for key in ("rotation", "norm", "effective_lr")}
            late = name == "b" and step >= 500
            kept = compared.add(
                step,
                name,
                unit["rotation"] * (2 if late else 1.1),
                unit["norm"],
                unit["effective_lr"] * (2 if late else 1),
            )
            assert [*kept.values()] == [unit["rotation"], unit["norm"]]
    assert compared.sentences() == [
        "a did as planned.",
        "b parts from the plan at about step 500: its rotation is 2 times what was planned, at a learning rate 2 times "
        "the planned one.",
    ]
    assert compared.add(1000, "a", 1.0, 1.0, 1.0) == {}
    assert compared.check_names(["a", "c"]) == ["b"]
    with pytest.raises(ValueError, match="`plan` must be one of this model, but is of a, b,"):
        compared.check_names(["c"])


def test_a_real_walk_goes_where_it_was_planned() -> None:
    """AdamW in float64 under noise, warm-up and cosine: norms and rotations of 32 units, as a mean over the run."""
    steps, entries, units = 800, 200, 32
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(units, entries, dtype=torch.float64, generator=generator) * 0.05)
    optimizer = torch.optim.AdamW([weight], lr=4e-3, betas=(0.9, 0.95), weight_decay=0.5, eps=1e-30)
    schedule = cosine(steps)
    start = float(twins.rows(weight.detach()).square().mean().sqrt())
    found = plan({"w": (start, entries)}, ADAM | {"lr": 4e-3}, schedule)
    apart: list[tuple[float, float]] = []
    for step in range(steps):
        before = weight.detach().clone()
        noise = torch.randn(units, entries, dtype=torch.float64, generator=generator)
        weight.grad = twins.across(noise, before) / twins.rows(before)
        optimizer.param_groups[0]["lr"] = 4e-3 * schedule[step]
        optimizer.step()
        if step >= 50:  # its averages are full
            norm = twins.rows(before).square().mean().sqrt()
            angle = torch.acos(
                (before * weight.detach()).sum(1, keepdim=True) / twins.rows(before) / twins.rows(weight.detach())
            )
            apart.append(
                (
                    float(norm) / found.at_step("w", "norm", step),
                    float(angle.square().mean().sqrt()) / found.at_step("w", "rotation", step),
                )
            )
    # Chance: squares of norms scatter by sqrt(2/C)/sqrt(U) = 1.8 %; of 1/v the mean is above 1/mean v by
    # (1 − β₂)/(1 + β₂) times the variance of g², 2·0.026 = 5 %, half of that for lengths.
    for place in (0, 1):
        values = sorted(pair[place] for pair in apart)
        assert values[len(values) // 2] == pytest.approx(1.0, abs=0.018 + 0.026)
