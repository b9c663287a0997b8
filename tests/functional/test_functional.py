import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_normreg import _metrics
from lightning_normreg import functional as F
from lightning_normreg.functional import _device
from lightning_normreg.functional._device import accumulator, as_on
from lightning_normreg.functional._norms import root_mean_square, row_norms
from tests import reference

SEED = 0
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
CASES = {  # shape, dim, groups
    "linear": ((8, 12), 0, 1),
    "conv2d": ((6, 4, 3, 3), 0, 1),
    "transposed convolution": ((6, 4, 3, 3), 1, 1),
    "transposed convolution with groups": ((6, 2, 3, 3), 1, 3),
    "transposed depthwise convolution": ((4, 1, 3), 1, 4),
    "embedding": ((20, 300), 0, 1),
    "column": ((300, 6), 1, 1),
    "vector": ((5,), 0, 1),
    "scalar": ((), 0, 1),
    "no rows": ((0, 4), 0, 1),
    "no entries": ((4, 0), 0, 1),
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_case = pytest.mark.parametrize("case", CASES)
every_unit = pytest.mark.parametrize("unit", ["neuron", "layer", 2])


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = SEED) -> Tensor:
    """Normal entries; those of another seed are independent."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=wide).to(dtype)


def exact(tensor: Tensor) -> np.ndarray:
    """The same numbers in float64."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()


def noise(tensor: Tensor) -> float:
    """Bound on the relative error of a norm with terms like these.

    A sum of 64 squares in 4 lanes rounds 20 times in a row, one of 16 squares across memory 16 times, by eps/2 each, of
    which the root keeps half: at most eps for every factor of two in the number of terms, and one more for the root.
    """
    terms = max(2, tensor.numel() * (1 + tensor.is_complex()))
    return (1 + math.log2(terms)) * torch.finfo(accumulator(tensor.dtype)).eps


def close(expected: list[float], actual: Tensor, *, rtol: float, atol: float = 0.0) -> None:
    """Compare in float64, NaN equal to NaN."""
    np.testing.assert_allclose(exact(actual), np.array(expected, dtype=float), rtol=rtol, atol=atol, strict=True)


@every_dtype
@every_case
@every_unit
def test_norms_match_the_oracle(dtype: torch.dtype, case: str, unit: str | int) -> None:
    """Norms of units and of the whole weight are those of float64 loops, in the accumulator's type."""
    shape, dim, groups = CASES[case]
    weight = random(shape, dtype)
    norms = F.unit_norms(weight, unit, dim=dim, groups=groups)
    assert norms.dtype == accumulator(dtype)
    close(reference.unit_norms(exact(weight), unit, dim, groups), norms, rtol=noise(weight))
    close(reference.weight_norm(exact(weight)), F.weight_norm(weight), rtol=noise(weight))
    rms = reference.root_mean_square(reference.unit_norms(exact(weight), unit, dim, groups))
    close(rms, root_mean_square(norms), rtol=2 * noise(weight))


@every_dtype
@every_case
@every_unit
def test_updates_match_the_oracle(dtype: torch.dtype, case: str, unit: str | int) -> None:
    """Rotation, relative update and gradient alignment are those of float64 loops, with the last unit zero."""
    shape, dim, groups = CASES[case]
    before, gradient = random(shape, dtype), random(shape, dtype, SEED + 1)
    after = before + gradient / 100
    if before.ndim > 1 and before.numel():
        before.select(dim, -1).zero_()
    where = {"unit": unit, "dim": dim, "groups": groups}
    # Two norms, their quotient and the arc tangent; three halves of the significand leave eps^1.5 of what is along.
    eps = torch.finfo(accumulator(dtype)).eps
    tolerances = {"rtol": 2 * noise(before) + 2 * eps, "atol": eps**1.5}
    for name in ("rotation", "relative_update"):
        actual = getattr(F, name)(before, after, **where)
        assert actual.dtype == accumulator(dtype)
        close(getattr(reference, name)(exact(before), exact(after), **where), actual, **tolerances)
    # Two norms, and a sum of products whose absolute values add up to at most 1.
    expected = reference.gradient_alignment(exact(before), exact(gradient), **where)
    close(expected, F.gradient_alignment(before, gradient, **where), rtol=0, atol=4 * noise(before))


@every_dtype
@every_case
@every_unit
def test_projection_matches_the_oracle(dtype: torch.dtype, case: str, unit: str | int) -> None:
    """Every entry is the oracle's, for one radius and for one per unit, and the norms before come back."""
    shape, dim, groups = CASES[case]
    where = {"unit": unit, "dim": dim, "groups": groups}
    start = random(shape, dtype)
    start = 20 * (start + torch.sgn(start))  # far from the radius, a single entry too
    units = len(reference.unit_indices(shape, **where))
    radii = 1 + torch.arange(units) % 8 / 8
    # The norm, dividing by the radius and by the quotient, and rounding to the weight's type, at worst to a subnormal.
    info = torch.finfo(dtype)
    tolerances = {"rtol": noise(start) + info.eps, "atol": info.smallest_normal * info.eps / 2}
    for radius in (0.75, radii):
        weight = start.clone()
        norms = F.project_(weight, radius, **where)
        close(reference.unit_norms(exact(start), **where), norms, rtol=noise(start))
        expected = reference.projected(exact(start), np.broadcast_to(np.asarray(radius), units), **where)
        np.testing.assert_allclose(exact(weight), expected, **tolerances, strict=True)


@pytest.mark.parametrize("groups", [1, 3])
def test_neurons_of_a_transposed_convolution_make_its_output_channels(groups: int) -> None:
    """The norm of neuron j is that of what output channel j answers to an impulse on every input channel."""
    layer = nn.ConvTranspose2d(6, 6, 3, groups=groups, bias=False)
    layer.weight.data = random((6, 6 // groups, 3, 3))
    answers = layer(torch.eye(6).reshape(6, 6, 1, 1))  # one input channel at a time: (in, out, 3, 3)
    expected = reference.unit_norms(exact(answers.detach().transpose(0, 1)))
    close(expected, F.unit_norms(layer.weight, dim=1, groups=groups), rtol=noise(layer.weight.detach()))


EXTREMES = [  # entry, how many of them, norm
    (1e30, 4, 2e30),
    (1e-30, 4, 2e-30),
    (1e30, 300, math.sqrt(300) * 1e30),
    (1e-30, 300, math.sqrt(300) * 1e-30),
    (2.0**-148, 9, 3 * 2.0**-148),
    (3e38, 1, 3e38),
    (3e38, 4, math.inf),
    (math.inf, 3, math.inf),
    (-math.inf, 300, math.inf),
    (math.nan, 3, math.nan),
    (0.0, 300, 0.0),
    (1.0, 300, math.sqrt(300)),
]


@pytest.fixture(params=["host", "wide"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """As a CPU does it, or a GPU."""
    with as_on(request.param):
        yield


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("entry, count, expected", EXTREMES)
def test_norms_of_extreme_entries(entry: float, count: int, expected: float) -> None:
    """Norms neither overflow nor underflow before the type does, alone or beside ordinary rows, reading or not."""
    row = torch.full((count,), entry)
    beside = torch.stack([torch.ones(count), row, torch.ones(count)])
    tolerances = {"rtol": noise(row), "atol": 2.0**-149}  # the smallest number, of which a subnormal norm is a multiple
    close(expected, F.weight_norm(row), **tolerances)
    close([math.sqrt(count), expected, math.sqrt(count)], F.unit_norms(beside), **tolerances)
    one_bad = torch.zeros(2, count)
    one_bad[1, -1] = entry
    close([0.0, abs(entry)], F.unit_norms(one_bad), **tolerances)


@pytest.mark.usefixtures("way")
def test_row_norms_of_all_scales() -> None:
    """Side by side in one tensor."""
    scales = 10.0 ** torch.arange(-44.0, 37.0, 2.0, dtype=torch.float64)
    batches = [random((9, 300)), (random((41, 300), torch.float64) * scales.unsqueeze(1)).float(), torch.zeros(3, 5)]
    for rows in batches:
        close(reference.unit_norms(exact(rows)), row_norms(rows), rtol=noise(rows), atol=1e-44)


def test_nothing_waits_for_a_device() -> None:
    """No function reads a value back, which would block a GPU: all run on tensors that have no values."""
    weight, after = torch.empty(8, 300, device="meta"), torch.empty(8, 300, device="meta")
    for function in (F.rotation, F.relative_update, F.gradient_alignment):
        assert function(weight, after).shape == (8,)
    assert F.weight_norm(weight).shape == ()
    assert F.effective_lr(torch.empty((), device="meta"), F.unit_norms(weight), 2).shape == (8,)
    assert F.project_(weight, torch.empty(8, device="meta")).shape == (8,)
    assert F.project_(weight, 2.0).shape == (8,)


@pytest.mark.slow
@pytest.mark.pitfall(23)
def test_norm_of_16_million_entries() -> None:
    """A float32 weight of 16 million entries keeps six digits, as one row and as many."""
    weight = random((4096, 4096))
    expected = math.sqrt(np.square(exact(weight)).sum())
    close(expected, F.weight_norm(weight), rtol=1e-6)
    close(expected, F.unit_norms(weight.reshape(1, -1))[0], rtol=1e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("length", [2, 9, 576])
@pytest.mark.parametrize("decay", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("angle_rad", [1e-5, 1e-3, 0.1, 1.0, 2.0, 3.0])
def test_rotation_keeps_its_digits(angle_rad: float, decay: float, length: int) -> None:
    """A rotation is right in all but its last digits, also where the radial part is 1000 times the tangential one."""
    start = random((3, length), torch.float64)
    along = start / start.norm(dim=1, keepdim=True)
    across = random(tuple(start.shape), torch.float64, SEED + 1)
    across -= (across * along).sum(dim=1, keepdim=True) * along
    across /= across.norm(dim=1, keepdim=True)
    # after = (1 − decay · t) along + t across has that angle for |tan| = t / |1 − decay · t|.
    tan, forward = abs(math.tan(angle_rad)), math.copysign(1.0, math.cos(angle_rad))
    t = tan / (forward + decay * tan) if decay else 0.0
    cos, sin = (1 - decay * t, t) if decay else (math.cos(angle_rad), math.sin(angle_rad))
    after = cos * along + sin * across
    for dtype in (torch.float32, torch.float64):
        before, after = start.to(dtype), (after * start.norm(dim=1, keepdim=True)).to(dtype)
        expected = reference.rotation(exact(before), exact(after))
        assert expected == pytest.approx([angle_rad] * len(start), rel=0.05)
        rtol = 2 * noise(before) + 2 * torch.finfo(dtype).eps  # two norms, their quotient and the arc tangent
        close(expected, F.rotation(before, after), rtol=min(rtol, 1e-5))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight measured a few rows at a time gives the bits that it gives at once, in the same order."""
    before, after = random((20, 300)), random((20, 300), seed=SEED + 1)
    whole = F.rotation(before, after), F.relative_update(before, after)
    for entries in (300, 1000):
        monkeypatch.setitem(_device.BLOCK, "host", entries)
        assert torch.equal(whole[0], F.rotation(before, after))
        assert torch.equal(whole[1], F.relative_update(before, after))


def test_rows_that_moved_along_themselves_beside_rows_that_turned() -> None:
    """Each row is measured by itself, whichever way its neighbours need; long rows as short ones."""
    before = random((6, 700))
    turned = before + 1e-3 * random((6, 700), seed=SEED + 1)
    after = torch.where(torch.tensor([True, False] * 3).unsqueeze(1), turned, 0.9 * turned)
    for rows in (slice(0, 6), slice(0, 1), slice(1, 2)):
        expected = reference.rotation(exact(before[rows]), exact(after[rows]))
        close(expected, F.rotation(before[rows], after[rows]), rtol=4 * noise(before))
    rows = before.reshape(1, -1), after.reshape(1, -1)
    whole = reference.rotation(*(exact(r) for r in rows))
    for columns in (64, 700, _device.BLOCK["host"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(_device.BLOCK, "host", columns)
            close(whole, F.rotation(*rows), rtol=4 * noise(rows[0]))


def test_steps_from_and_to_zero_have_no_angle() -> None:
    """A unit that is zero on either side did not turn; it did not move relative to itself if it was zero before."""
    weight, zero = random((5, 50)), torch.zeros(5, 50)
    for before, after in [(weight, zero), (zero, weight), (zero, zero)]:
        assert F.rotation(before, after).tolist() == [0.0] * 5
        assert F.gradient_alignment(before, after).tolist() == [0.0] * 5
    assert F.relative_update(zero, weight).tolist() == [0.0] * 5
    close([1.0] * 5, F.relative_update(weight, zero), rtol=noise(weight))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_units_show(bad: float) -> None:
    """An infinite or NaN entry gives a value that is not finite, in its own unit only."""
    broken, whole = random((3, 50)), random((3, 50), seed=SEED + 1)
    broken[1, 7] = bad
    for before, after in [(broken, whole), (whole, broken)]:
        for function in (F.rotation, F.relative_update, F.gradient_alignment):
            assert function(before, after).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_effective_lr_matches_the_oracle(exponent: int) -> None:
    """η/n^p for numbers and tensors, right even where n² leaves the type, and infinite at n = 0 whatever η is."""
    norms = [1e-18, 1e-3, 1.0, 3.0, 1e18]
    rtol = (exponent + 1) * torch.finfo(torch.float32).eps  # η rounded once, then one division at a time
    expected = [reference.effective_lr(0.1, n, exponent) for n in norms]
    close(expected, F.effective_lr(0.1, torch.tensor(norms), exponent), rtol=rtol)
    close(expected, F.effective_lr(torch.tensor(0.1), torch.tensor(norms), exponent), rtol=rtol)
    close(expected[3], F.effective_lr(0.1, 3.0, exponent), rtol=rtol)
    close(1e-10 / 1e-23**exponent, F.effective_lr(1e-10, torch.tensor(1e-23), exponent), rtol=rtol + exponent * rtol)
    for lr in (0.0, 0.1):
        close(reference.effective_lr(lr, 0.0, exponent), F.effective_lr(lr, torch.tensor(0.0), exponent), rtol=rtol)


@pytest.mark.parametrize(
    "error, call, message",
    [
        (ValueError, lambda w: F.unit_norms(w, "row"), r"`unit` must be one of 'neuron', 'layer'.*, got 'row'\."),
        (ValueError, lambda w: F.unit_norms(w, 0), r"`unit` must be .* a number of neighbouring neurons, got 0\."),
        (ValueError, lambda w: F.project_(w, unit=3), r"`unit` must divide the number of neurons .*, got 3 for 2\."),
        (TypeError, lambda w: F.unit_norms(w.int()), r"`weight` must be a floating-point tensor, got torch\.int32\."),
        (ValueError, lambda w: F.rotation(w, w[:1]), r"`after` must have the weight's shape \(2, 3\), got \(1"),
        (ValueError, lambda w: F.relative_update(w, w.t()), r"`after` must have the weight's shape .*, got \(3, 2\)\."),
        (ValueError, lambda w: F.gradient_alignment(w, w[0]), r"`gradient` must have the weight's shape .*got \(3,\)"),
        (ValueError, lambda w: F.project_(w, 0.0), r"`radius` must be positive and finite, got 0\.0\. Use 1\.0"),
        (ValueError, lambda w: F.project_(w, math.inf), r"`radius` must be positive and finite, got inf\."),
        (ValueError, lambda w: F.project_(w, math.nan), r"`radius` must be positive and finite, got nan\."),
        (ValueError, lambda w: F.project_all_([w, w], [1.0]), r"`radius` must be one number or 2 of them, got 1\."),
        (ValueError, lambda w: F.project_all_([w], [-2.0]), r"`radius` must be positive and finite, got -2\.0\."),
    ],
)
def test_errors_name_the_argument_and_the_rule(error: type[Exception], call, message: str) -> None:
    """A wrong argument is refused in words, and the weight stays as it was."""
    weight = random((2, 3))
    kept = weight.clone()
    with pytest.raises(error, match=message):
        call(weight)
    assert torch.equal(kept, weight)


def test_table_of_curves() -> None:
    """Keys and summaries are unique, and the documentation's table has one row for each of them."""
    keys = [curve.key for curve in _metrics.CURVES]
    summaries = [curve.summary for curve in _metrics.CURVES if curve.summary]
    assert len(set(keys)) == len(keys)
    assert len(set(summaries)) == len(summaries)
    assert set(_metrics.CURVES) == {v for v in vars(_metrics).values() if isinstance(v, _metrics.Curve)}
    rows = _metrics.markdown_table().splitlines()[2:]
    logged = [curve.key for curve in _metrics.CURVES if curve.of != "layers"]  # the others as summaries alone
    assert [row.split("`")[1].split("/")[1] for row in rows] == logged + [_metrics.SUMMARY_GROUP] * len(summaries)


def test_table_of_curves_has_four_cells_in_each_row() -> None:
    """A bar inside a cell is escaped: every row has the header's four cells."""
    cells = [row.replace(r"\|", "").count("|") - 1 for row in _metrics.markdown_table().splitlines()]
    assert [4] * len(cells) == cells
