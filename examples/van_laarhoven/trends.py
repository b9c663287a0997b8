"""Which of the paper's trends appeared: the rules, and the sentences with the numbers that they were decided by.

The rules and their constants were written before results of the seeds that are reported were seen (the grid was chosen
on others).
Intervals are of level 95 % over the seeds. Errors enter as logarithms.

1. Flat along diagonals: variance of the error along diagonals of constant effective rate (decay > 0), noise taken out,
   less ``FLAT`` times that across is below 0 with the upper end of its interval; and shuffling decays gives as flat a
   grid with p < 0.05.
2. No effect of decay under projection: over decays that are small (``measured.SMALL``) and 0, the variance of the error
   at fixed learning rate with projection, less ``COLLAPSED`` times that without, is below 0 with the upper end of its
   interval.
3. Norm growth without decay: at every learning rate d log‖w‖/d log t, over the last quarter of the constant part, is
   above 0 with the lower end of its interval.
4. Levelling with decay: where the run is long enough (``measured.SHORT``), the mean of |d log‖w‖/d log t|,
   less ``LEVEL`` times the mean slope without decay, is below 0 with the upper end of its interval.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from examples.van_laarhoven.estimates import (
    Array,
    Interval,
    Mask,
    across,
    along,
    along_less_across,
    along_over_across,
    collapse,
    components,
    exponent,
    jackknife,
    mean_interval,
    over_decays,
    permutation_p,
    rank_correlation,
)
from examples.van_laarhoven.measured import SMALL, Measured

FLAT, COLLAPSED, LEVEL = 0.5, 0.25, 0.5


class Trend(NamedTuple):
    """A trend of one optimizer; ``appeared`` is None where cells or seeds are too few to tell."""

    name: str
    appeared: bool | None
    sentences: list[str]


def flat_along_diagonals(plain: Measured) -> Trend:
    """Rule 1."""
    grid = plain.log_error[:, :, 1:]
    ratio, rule = jackknife(along_over_across, grid), along_less_across(grid, FLAT)
    p = permutation_p(grid)
    parts = components(along(grid)), components(across(grid))
    noise = (parts[0].noise + parts[1].noise) / 2
    sentences = [
        f"Errors spread by a factor of {_factor(parts[0].variance)} along diagonals of constant {plain.rate_words} and "
        f"of {_factor(parts[1].variance)} across (standard deviations of the logarithm between cells, without noise); "
        f"the noise of a single run is a factor of {_factor(noise)}.",
        f"Variance along over variance across is {_words(ratio)} (0 is flat, less is chance); along less {FLAT:g} "
        f"times across is {_words(rule)}, which has to end below 0 to be called flat.",
        *_undecided(rule),
        f"Shuffling the decays within each learning rate gave a grid as flat in a share p = {p:.3g} of cases.",
        _widest_diagonal(plain),
    ]
    flat = _below_0(rule)
    return Trend("flat along diagonals", flat and p < 0.05, sentences)


def _widest_diagonal(plain: Measured) -> str:
    """The diagonal with the largest ratio of errors, and how many of its cells had time to settle."""
    error, rate, settled = (a[:, 1:] for a in (plain.error.mean(axis=0), plain.rate, plain.long_enough()))
    lines = [line[0] for line in along(error[None])]
    k = int(np.argmax([line.max() / line.min() for line in lines]))
    rates, long = along(rate[None])[k][0], along(settled[None].astype(np.float64))[k][0]
    return (
        f"The least flat diagonal is that of {plain.rate_words} = {rates[0]:.2g}: errors of {lines[k].min():.1f} to "
        f"{lines[k].max():.1f} %; the norms had time to settle in {int(long.sum())} of its {len(long)} cells."
    )


def no_effect_under_projection(plain: Measured, projected: Measured) -> Trend:
    """Rule 2."""
    name = "no effect of decay under projection"
    small = projected.small_decay()
    if not (small.sum(axis=1) > 1).any():
        return Trend(name, None, ["No learning rate has a small decay beside 0."])
    grids = plain.log_error, projected.log_error
    everything = np.ones_like(small)
    ratio, rule = collapse(*grids, small, COLLAPSED)
    ratio_of_all, _ = collapse(*grids, everything, COLLAPSED)
    spread, spread_of_all = (
        [_factor(components(over_decays(grid, kept)).variance) for grid in grids] for kept in (small, everything)
    )
    best = [(m.error.mean(axis=0).min(), m.error.mean(axis=0)[:, 0].min()) for m in (plain, projected)]
    sentences = [
        f"At a fixed learning rate, over decays that are small ({int(small.sum())} of {small.size} cells), errors "
        f"spread by a factor of {spread[0]} without projection and of {spread[1]} with it.",
        f"The ratio of the variances is {_words(ratio)} (0 is no effect, less is chance); with projection less "
        f"{COLLAPSED:g} times without is {_words(rule)}, which has to end below 0 to be called no effect.",
        *_undecided(rule),
        f"Over all decays of the grid the factors are {spread_of_all[0]} and {spread_of_all[1]}, and the ratio is "
        f"{_words(ratio_of_all)}.",
        *_gains(grids, projected, small),
        *_changes(projected, small),
        f"The least mean error is {best[0][0]:.1f} % without projection ({best[0][1]:.1f} % without decay), "
        f"{best[1][0]:.1f} % with it ({best[1][1]:.1f} % without decay).",
    ]
    return Trend(name, _below_0(rule), sentences)


def _gains(grids: tuple[Array, Array], projected: Measured, small: Mask) -> list[str]:
    """What momentum makes of small decays, and the ratio without those of which it makes much."""
    if projected.optimizer == "adam":
        return []
    gain = projected.gain()
    slight = gain <= 1 + SMALL
    spread = [_factor(components(over_decays(grid, slight)).variance) for grid in grids]
    return [
        f"Momentum makes of small decays a rate up to {gain[small].max():.2f} times as high; over the "
        f"{int(slight.sum())} cells with at most {1 + SMALL:g} times, errors spread by {spread[0]} without projection "
        f"and by {spread[1]} with it."
    ]


def _changes(projected: Measured, small: Mask) -> list[str]:
    """By what factors decay changes the error of projected runs."""
    change = np.exp((projected.log_error - projected.log_error[:, :, :1]).mean(axis=0))[:, 1:]
    said = []
    for which, kept in (("small", small[:, 1:]), ("larger", ~small[:, 1:])):
        if kept.any():
            said.append(f"{which} ones by factors of {change[kept].min():.2f} to {change[kept].max():.2f}")
    return [f"Decays change the mean error of projected cells, against none: {', '.join(said)}."]


def norm_growth(plain: Measured) -> Trend:
    """Rule 3."""
    growth = [mean_interval(column) for column in plain.growth()[:, :, 0].T]
    whole = (plain.norm[:, :, 0, plain.constant - 1] / plain.norm[:, :, 0, 0]).mean(axis=0)
    told = ", ".join(f"{_words(g)} at {lr:.2g}" for lr, g in zip(plain.lrs, growth, strict=True))
    parts = slice(plain.constant // 4), plain.last_quarter
    first, last = (plain.gradient_at_norm_1(part)[:, :, 0] for part in parts)
    change = np.exp(np.log(last / first).mean(axis=(0, 2)))
    sentences = [
        f"Without decay norms grow by a factor of {whole[0]:.2f} at the lowest and {whole[-1]:.2f} at the highest "
        "learning rate over the constant part.",
        f"Exponents of ‖w‖ in t over its last quarter, by learning rate: {told}.",
        f"Constant noise would give up to 1/{2 * plain.power}, the more the further the norm is from its start; but "
        f"from the first to the last quarter the gradient at norm 1 changed by factors of {change.min():.2f} to "
        f"{change.max():.2f}.",
    ]
    appeared = None if len(plain.error) < 2 else all(g.low > 0 for g in growth)
    return Trend("norm growth without decay", appeared, sentences)


def levelling(plain: Measured) -> Trend:
    """Rule 4."""
    name = "levelling with it"
    settled = plain.long_enough()
    if settled.sum() < 3:
        return Trend(name, None, [f"The run is long enough for {int(settled.sum())} cells only."])
    growth = plain.growth()
    level, without = np.abs(growth[:, settled]).mean(axis=1), growth[:, :, 0].mean(axis=1)
    rule = mean_interval(level - LEVEL * without)
    steepest = np.abs(growth.mean(axis=0))[settled].max()
    signed = mean_interval(growth[:, settled].mean(axis=1))
    scatter = growth[:, settled].std(axis=0, ddof=1).mean() if len(growth) > 1 else 0.0
    wobble = np.log(plain.norm[..., plain.last_quarter]).std(axis=-1).mean(axis=0)[settled]
    reached, kept = (rank_correlation(plain.rate[settled], steps[:, settled]) for steps in plain.settle_steps())
    sentences = [
        f"The run is long enough for the norm to settle in {int(settled.sum())} of {settled[:, 1:].size} cells with "
        f"decay; there the mean of |d log‖w‖/d log t| is {_words(mean_interval(level))}, without decay the mean slope "
        f"is {_words(mean_interval(without))}.",
        f"The one less {LEVEL:g} times the other is {_words(rule)}, which has to end below 0 to be called level; the "
        f"steepest cell has {steepest:.2f}.",
        *_undecided(rule),
        f"With its sign the mean slope of these cells is {_words(signed)}; the slopes of single runs scatter around "
        f"that of their cell by {scatter:.2f}, which enters the mean of absolute values.",
        f"Rank correlation of {plain.rate_words} with the step at which the norm is first within 10 % of its last mean "
        f"is {_words(reached)}, with the step from which on it stays there {_words(kept)}; −1 is: the larger, the "
        "earlier. Meanwhile the norm of a single run wobbles by a standard deviation of "
        f"{wobble.min():.1%} to {wobble.max():.1%}.",
        _drift(plain, settled),
        *_exponents(plain, settled),
    ]
    return Trend(name, _below_0(rule), sentences)


def _drift(plain: Measured, settled: Mask) -> str:
    """How far settled norms move, and how far they should as the gradient does."""
    last = plain.last_quarter
    third = slice(2 * last.start - last.stop, last.start)
    norms = [np.log(plain.norm[..., part]).mean(axis=-1)[:, settled] for part in (third, last)]
    gradients = [np.log(plain.gradient_at_norm_1(part)).mean(axis=3)[:, settled] for part in (third, last)]
    moved, followed = (np.exp(np.median(late - early)) for early, late in (norms, gradients))
    return (
        f"From the third quarter to the last the median of these norms changed by a factor of {moved:.3f}, that of the "
        f"gradient at norm 1, to whose power {plain.gradient_exponent:.2g} a settled norm is proportional, by "
        f"{followed:.3f}."
    )


def _exponents(plain: Measured, settled: Mask) -> list[str]:
    """Fitted exponents of the settled norm and rate, as they are and with the measured gradient divided out."""
    ratio = (plain.lrs[:, None] / np.where(plain.decays > 0, plain.decays, np.inf))[settled]
    norm, rate = plain.settled_norm()[:, settled], plain.settled_rate()[:, settled]
    gradient = np.exp(np.log(plain.gradient_at_norm_1()).mean(axis=3))[:, settled]
    fits = [
        ("‖w‖ in lr/decay", exponent(ratio, norm), plain.norm_exponent),
        (
            f"the effective rate in {plain.rate_words}",
            exponent(plain.rate[settled], rate),
            plain.rate_exponent,
        ),
        (
            f"the effective rate in {plain.rate_words}, times that power of the gradient at norm 1 that it falls with",
            exponent(plain.rate[settled], rate * gradient ** (plain.power * plain.gradient_exponent)),
            plain.rate_exponent,
        ),
        (
            "‖w‖ in lr/decay with the measured gradient at norm 1 divided out",
            exponent(ratio, norm / gradient**plain.gradient_exponent),
            plain.norm_exponent,
        ),
    ]
    return [
        f"Exponent of {what}: {_words(fit)}, where constant noise gives {expected:.3g}, which is "
        f"{'in' if expected in fit else 'not in'} the interval."
        for what, fit, expected in fits
    ]


def expected_words(projected: Measured) -> str:
    """What is expected of decay under projection."""
    if projected.optimizer == "sgd":
        return (
            "Expected under projection: decay takes away the share κ = lr·decay/(1 − m) of a weight per step, at "
            f"momentum m, and projection puts it back; small is κ ≤ {SMALL:g}. Without momentum that is projected SGD "
            "without decay at lr/(1 − lr·decay), exactly. With Nesterov momentum it is in the long run like one at "
            "lr/(1 − κ·(1 − m + m²)/(1 − m)), as what was radial in the buffer is tangential once the weight turns."
        )
    return (
        "Expected under projection: Adam scales the gradient with decay in it, so decay has no effect as long as "
        f"decay·‖w‖ is small beside the gradient; small is ≤ {SMALL:g} of it in every layer, measured in the projected "
        "runs without decay."
    )


def _undecided(rule: Interval) -> list[str]:
    """Said where a trend has not appeared for want of precision."""
    near = rule.value < 0 <= rule.high < np.inf
    return ["The estimate is on the trend's side of 0, but these seeds cannot tell it from chance."] if near else []


def _below_0(found: Interval) -> bool | None:
    """Whether an interval ends below 0; None if there are too few seeds for an interval."""
    return found.high < 0 if np.isfinite(found.high) else None


def _factor(variance: float) -> str:
    """A variance of logarithms as a factor."""
    return f"{np.exp(np.sqrt(max(variance, 0.0))):.2f}"


def _words(found: Interval) -> str:
    """An estimate with its interval."""
    if not np.isfinite(found.high):
        return f"{found.value:.3g} (too few seeds for an interval)"
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"
