"""What rotation control takes out of a recipe, exactly, and what it does not."""

from __future__ import annotations

import pytest

from tests.elimination import DECAYS, LOSSES, OPTIMIZERS, SCALES, control, control_at_initial, difference, projection

COUPLED = ("SGD, momentum", "SGD, Nesterov", "Adam", "RMSprop")
# In float64 each step rounds directions by some 1e-16, which the network's own sensitivity carries on for 50 steps.
# At a norm of 1000 an update of SGD is 1e-6 times as large against the weight that it is rounded with, so 1e-16 of the
# weight are 1e-8 of the direction of a step, and 1e-10 of the weight's own with each step of 0.03 rad.
EXACT, AT_INITIAL = 1e-9, 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_initial_norms_do_not_matter(optimizer: str) -> None:
    """Multiplied by 1e-3 to 1e3; at a radius of 1 for all optimizers."""
    assert difference(optimizer, control, SCALES) < EXACT


@pytest.mark.parametrize("optimizer", ["SGD", "Lion"])
def test_initial_norms_do_not_matter_where_they_are_held(optimizer: str) -> None:
    """At the initial radius, for optimizers without an eps: gradients go with 1/‖w‖, which the angle takes out."""
    assert difference(optimizer, control_at_initial, SCALES) < AT_INITIAL
    assert difference(optimizer, None, SCALES) > 1e-2


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in COUPLED])
def test_radial_decay_does_not_matter(optimizer: str) -> None:
    """Decoupled, or of plain SGD, from 0 to 0.1."""
    assert difference(optimizer, control, DECAYS) < EXACT
    assert difference(optimizer, projection, DECAYS) > 1e-4  # whose update does not shrink along with the weight


@pytest.mark.parametrize("optimizer", COUPLED)
def test_decay_that_is_remembered_still_turns(optimizer: str) -> None:
    """Added to the gradient it stays in momentum, or in the second moment, when the weight has turned."""
    assert difference(optimizer, control, DECAYS) > 1e-3


@pytest.mark.parametrize("optimizer", ["SGD", "SGD, momentum", "SGD, Nesterov"])
def test_the_size_of_the_loss_does_not_matter(optimizer: str) -> None:
    """Multiplied by 1e-3 to 1e3, with optimizers that are linear in the gradient."""
    assert difference(optimizer, control, LOSSES) < EXACT
    assert difference(optimizer, projection, LOSSES) > 1e-2
