"""The callback that holds norms."""

from __future__ import annotations

from lightning_normreg._weights import Watched
from lightning_normreg.callbacks._holding import NormHolder
from lightning_normreg.steps._projector import Projector


class NormProjection(NormHolder):
    r"""Holds the norm of weights: after each optimizer step, :math:`w_u \leftarrow R\,w_u/\lVert w_u\rVert`.

    For scale-invariant weights this leaves the network's function alone and removes a hyperparameter: the effective
    learning rate is then lr/R^p for the whole run. Decay on these weights is best 0: it is left as a factor on the rate
    alone, 1/(1 − ηλ) with plain SGD (exactly), about 1/(1 − ηλ/(1−m)²) with momentum m.

    When it runs: before the first step, then in the optimizer's step post-hook, after the monitors have measured the
    step. It is a rescale, not a parametrization: no gradient goes through it, and it leaves the optimizer's state as
    it is.

    At the first projection a bias that belongs to the unit is scaled along, running means and variances follow
    (BatchNorm's, InstanceNorm's, and those of classes of one's own), BatchNorm's gain makes good what its eps no longer
    takes, and the state of an optimizer that is under way follows too. By how much the outputs of the batch change all
    the same, in training and in evaluation mode, is measured and said. The recipe does change: by what factor the
    effective learning rates do is said.

    What it logs: nothing; units that cannot be projected (zero, infinite, NaN) are reported once.

    What it costs: per step two operations for each tensor: on a CPU, and without float64, two reads and one write of
    the weights; on a GPU the sums are made in float64, which may cost four passes more. No transfer. Once, before the
    first step, six to eight forward passes of that batch on a private copy.

    Args:
        radius: ``"auto"``: 1 for a neuron or column, √k for a layer of k neurons, √fan_in for a neuron under weight
            standardization; ``"initial"``: the norm that each unit had at the start (kept in checkpoints; of a unit
            that was zero, the one that its first update gives it); a number: that norm for every unit.
        unit: ``"auto"``: the units that are scale-invariant; ``"neuron"``: one output row; ``"column"``: what one input
            feeds into all neurons; ``"layer"``: the whole tensor; ``"set"``: the units that are scale-invariant, and
            sets of tensors that are so together: one norm, by default that at the start, which changes nothing.
        include: Globs over clean parameter names; by default all weights and embeddings that are scale-invariant. A
            glob takes what is trained, and one that matches nothing is an error.
        exclude: Globs of parameters to leave out.
        invariance: Which units are scale-invariant, as a file of ``save_verdict`` or what is in it; by default the
            model is probed at the first batch (:func:`find_scale_invariance`), once for all callbacks. Gradients of
            training alone are too weak as evidence.
        symmetries: For ``unit="set"``, all scaling symmetries as a file of :meth:`Symmetries.save` or what is in it; by
            default they are looked for on the first batch (:func:`find_symmetries`), where 60 passes are enough.
        on_not_invariant: What to do with a weight that ``include`` names and that is not known to be scale-invariant:
            ``"raise"``, ``"skip"`` it, or ``"allow"`` it: then the projection changes what the network computes.
        on_lost: What to do when gradients of training show that a weight is no longer scale-invariant: ``"stop"``
            holding it, and say so; ``"keep"`` on, which changes the function; ``"raise"`` a RuntimeError.
        twins: What the first projection does with copies of its weights that no optimizer updates (of the same shape,
            each unit at a cosine above 0.99: an averaged teacher, a target network): ``"follow"``: multiply them by
            the same factors, so that the average goes on at the same rate and computes the same; ``"keep"`` them.
        project_averaged: Project the weights that a WeightAveraging, EMAWeightAveraging or StochasticWeightAveraging
            callback averages, for validation, checkpoints and the end of the run. The average itself goes on
            unprojected. Put NormProjection after that callback.

    Raises:
        ValueError: For an argument out of its range, nothing to project, a weight that is not scale-invariant,
            or is not because of eps (an eps share above 10 %), one named in full that no optimizer updates (unless
            a finetuning callback is there to thaw it), one that another NormProjection or a RotationControl holds, or
            ``project_averaged`` without an averaging callback before this one; before the first step.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormProjection()], logger=False)

    Reference:
        van Laarhoven 2017, section "Normalizing Weights", https://arxiv.org/abs/1706.05350.
    """

    def _make_projector(self, targets: list[Watched]) -> Projector:
        return Projector(targets, self.radius)
