"""Which of the paper's trends appeared: the rules, and the sentences with the numbers that they were decided by.

The rules and their constants were written before the seeds that are reported were run (the grid was chosen on others).
Intervals are of level 95 % over the seeds. Errors enter as logarithms.

1. Flat along diagonals: variance of the error along diagonals of constant effective rate (decay > 0), noise taken out, is
   less than ``FLAT`` of that across, with the upper end of its interval; and shuffling decays gives as flat a grid with
   p < 0.05.
2. No effect of decay under projection: over decays that are small (``measured.SMALL``) and 0, the variance of the error
   at fixed learning rate is with projection less than ``COLLAPSED`` of that without, with the upper end of its interval.
3. Norm growth without decay: at every learning rate d log‖w‖/d log t, over the last quarter of the constant part, is
   above 0 with the lower end of its interval.
4. Levelling with decay: where the run is long enough (``measured.SHORT``), the mean of |d log‖w‖/d log t| is less than
   ``LEVEL`` of the mean without decay, with the upper end of its interval.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from examples.van_laarhoven.estimates import (
    Array,
    Interval,
    across,
    along,
    along_over_across,
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
FLAT_NAME = "flat along diagonals"
PROJECTED_NAME = "no effect of decay under projection"
GROWTH_NAME = "norm growth without decay"
LEVEL_NAME = "levelling with it"


class Trend(NamedTuple):
    """A trend of one optimizer. ``appeared`` is None where the grid cannot tell."""

    name: str
    appeared: bool | None
    sentences: list[str]


def flat_along_diagonals(plain: Measured) -> Trend:
    """Rule 1."""
    grid = plain.log_error[:, :, 1:]
    found = jackknife(along_over_across, grid)
    p = permutation_p(grid)
    lines = {"along": components(along(grid)), "across": components(across(grid))}
    widest = _widest_diagonal(plain)
    sentences = [
        f"Errors spread by a factor of {_factor(lines['along'].variance)} along diagonals of constant {plain.rate_words} "
        f"and of {_factor(lines['across'].variance)} across (standard deviations of the logarithm between cells, noise "
        f"taken out); seeds alone move a cell by {_factor((lines['along'].noise + lines['across'].noise) / 2)}.",
        f"Variance along over variance across is {_words(found)}; to be called flat the interval has to end below "
        f"{FLAT:g}.",
        f"Shuffling the decays within each learning rate gave a grid as flat in a share p = {p:.3g} of cases.",
        widest,
    ]
    return Trend(FLAT_NAME, bool(found.high < FLAT and p < 0.05), sentences)


def _widest_diagonal(plain: Measured) -> str:
    """The diagonal with the largest ratio of errors, and how many of its cells had time to settle."""
    error, rate, settled = plain.error.mean(axis=0)[:, 1:], plain.rate[:, 1:], plain.long_enough()[:, 1:]
    lines = [line[0] for line in along(error[None])]
    k = int(np.argmax([line.max() / line.min() for line in lines]))
    rates, long = along(rate[None])[k][0], along(settled[None].astype(float))[k][0]
    return (
        f"The least flat diagonal is that of {plain.rate_words} = {rates[0]:.2g}: errors of {lines[k].min():.1f} to "
        f"{lines[k].max():.1f} %; the norms had time to settle in {int(long.sum())} of its {len(long)} cells."
    )


def no_effect_under_projection(plain: Measured, projected: Measured) -> Trend:
    """Rule 2."""
    small = projected.small_decay()
    counts = small.sum(axis=1)
    if (counts > 1).sum() == 0:
        return Trend(PROJECTED_NAME, None, ["No learning rate has two decays that are small."])
    both = np.concatenate([plain.log_error, projected.log_error], axis=1)
    spread = {"all": _over_decays_ratio(both, np.ones_like(small)), "small": _over_decays_ratio(both, small)}
    sentences = [
        f"At a fixed learning rate, over decays that are small ({int(small.sum())} of {small.size} cells), errors spread "
        f"by a factor of {_factor(_over_decays(plain, small))} without projection and of "
        f"{_factor(_over_decays(projected, small))} with it.",
        f"The ratio of the variances is {_words(spread['small'])}; to be called no effect the interval has to end below "
        f"{COLLAPSED:g}.",
        f"Over all decays of the grid the factors are {_factor(_over_decays(plain, np.ones_like(small)))} and "
        f"{_factor(_over_decays(projected, np.ones_like(small)))}, and the ratio is {_words(spread['all'])}.",
    ]
    if not small.all():
        change = np.exp((projected.log_error - projected.log_error[:, :, :1]).mean(axis=0))
        sentences.append(
            f"Decays that are not small change the error of projected runs by factors of {change[~small].min():.2f} to "
            f"{change[~small].max():.2f} against none, small ones by {change[:, 1:][small[:, 1:]].min():.2f} to "
            f"{change[:, 1:][small[:, 1:]].max():.2f}."
            if small[:, 1:].any()
            else "No decay but 0 is small."
        )
    best = {m.projected: m.error.mean(axis=0) for m in (plain, projected)}
    sentences.append(
        f"The least mean error is {best[False].min():.1f} % without projection ({best[False][:, 0].min():.1f} % without "
        f"decay), {best[True].min():.1f} % with it ({best[True][:, 0].min():.1f} % without decay)."
    )
    return Trend(PROJECTED_NAME, bool(spread["small"].high < COLLAPSED), sentences)


def _over_decays(measured: Measured, kept: Array) -> float:
    return components(over_decays(measured.log_error, kept)).variance


def _over_decays_ratio(both: Array, kept: Array) -> Interval:
    """Variance over decays, projected over plain, of the two grids one after the other."""

    def ratio(grids: Array) -> float:
        plain, projected = np.split(grids, 2, axis=1)
        parts = [components(over_decays(grid, kept)).variance for grid in (projected, plain)]
        return max(parts[0], 0.0) / parts[1]

    return jackknife(ratio, both)


def norm_growth(plain: Measured) -> Trend:
    """Rule 3."""
    growth = [mean_interval(column) for column in plain.growth()[:, :, 0].T]
    whole = plain.norm[:, :, 0, plain.constant - 1] / plain.norm[:, :, 0, 0]
    told = ", ".join(f"{_words(g)} at {lr:.2g}" for lr, g in zip(plain.lrs, growth, strict=True))
    gradient = np.exp(np.log(plain.gradient_at_norm_1()[:, :, 0]).mean(axis=(0, 2)))
    sentences = [
        f"Without decay norms grow by factors of {whole.mean(axis=0).min():.2f} to {whole.mean(axis=0).max():.2f} over "
        f"the constant part, from the lowest to the highest learning rate.",
        f"Exponents of ‖w‖ in t over its last quarter: {told}.",
        f"Constant noise would give up to 1/{2 * plain.power}, from below, once the norm is far from its start; the "
        f"gradient at norm 1 late in the runs is {gradient.max() / gradient.min():.1f} times larger at one learning rate "
        "than at another, so noise is not constant here.",
    ]
    return Trend(GROWTH_NAME, all(g.low > 0 for g in growth), sentences)


def levelling(plain: Measured) -> Trend:
    """Rule 4."""
    settled = plain.long_enough()
    if settled.sum() < 3:
        return Trend(LEVEL_NAME, None, [f"The run is long enough in {int(settled.sum())} cells only."])
    growth = plain.growth()
    with_decay, without = np.abs(growth[:, settled]).mean(axis=1), growth[:, :, 0].mean(axis=1)
    found = mean_interval(with_decay / without)
    late = np.abs(growth.mean(axis=0))[settled]
    sentences = [
        f"The run is long enough for the norm to settle in {int(settled.sum())} of {settled[:, 1:].size} cells with "
        f"decay; there the mean of |d log‖w‖/d log t| is {_words(mean_interval(with_decay))}, without decay the mean "
        f"slope is {_words(mean_interval(without))}.",
        f"Their ratio is {_words(found)}; to be called level the interval has to end below {LEVEL:g}. The steepest cell "
        f"has {late.max():.2f}.",
        f"Rank correlation of {plain.rate_words} with the step from which on the norm stays within 10 %: "
        f"{_words(rank_correlation(plain.rate[settled], plain.settle_step()[:, settled]))}; −1 is: the larger, the "
        "earlier.",
        *_exponents(plain, settled),
    ]
    return Trend(LEVEL_NAME, bool(found.high < LEVEL), sentences)


def _exponents(plain: Measured, settled: Array) -> list[str]:
    """Fitted exponents of the settled norm and rate, as they are and with the measured gradient divided out."""
    ratio = (plain.lrs[:, None] / np.where(plain.decays > 0, plain.decays, np.inf))[settled]
    norm = exponent(ratio, plain.settled_norm()[:, settled])
    rate = exponent(plain.rate[settled], plain.settled_rate()[:, settled])
    # ‖w‖ ∝ G^(1/2) for SGD and G^(1/3) for Adam, with G the gradient at norm 1.
    power = 1 / (4 - plain.power) if plain.optimizer == "adam" else 1 / 2
    gradient = np.exp(np.log(plain.gradient_at_norm_1()).mean(axis=3))[:, settled]
    clean = exponent(ratio, plain.settled_norm()[:, settled] / gradient**power)
    fits = [
        ("‖w‖ in lr/decay", norm, plain.norm_exponent),
        (f"the effective rate in {plain.rate_words}", rate, plain.rate_exponent),
        ("‖w‖ in lr/decay with the measured gradient at norm 1 divided out", clean, plain.norm_exponent),
    ]
    return [
        f"Exponent of {what}: {_words(fit)}, where constant noise gives {expected:.3g}"
        f"{' (in' if expected in fit else ' (not in'} the interval)."
        for what, fit, expected in fits
    ]


def removed_words(projected: Measured) -> str:
    """What is expected of decay under projection."""
    if projected.optimizer == "sgd":
        return (
            "Expected: decay takes away the share κ = lr·decay/(1 − momentum) of a weight per step, projection puts it "
            f"back, and so the step grows by 1/(1 − κ), to first order; small is κ ≤ {SMALL:g}. (Without momentum this is "
            "exact: projected SGD with decay is projected SGD without, at lr/(1 − lr·decay).)"
        )
    return (
        "Expected: Adam scales the gradient with decay in it, so decay has no effect as long as decay·‖w‖ is small beside "
        f"the gradient; small is ≤ {SMALL:g} of it in every layer, measured in the projected runs without decay."
    )


def _factor(variance: float) -> str:
    """A variance of logarithms as a factor."""
    return f"{np.exp(np.sqrt(max(variance, 0.0))):.2f}"


def _words(found: Interval) -> str:
    """An estimate with its interval."""
    if not np.isfinite(found.high - found.low):
        return f"{found.value:.3g} (too few seeds for an interval)"
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"
