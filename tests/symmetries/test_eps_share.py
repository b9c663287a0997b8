"""The eps share against the variance computed by hand, at the module's own weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_normreg._symmetries import find_scale_invariance

# The share is a mean over a few float64 numbers, read back through two backward passes: some 100 roundoffs of 1e-16,
# relative to shares of 1e-5 at the least.
CLOSE = 1e-9


def loss(module, batch):
    """Not symmetric in the outputs, so that nothing cancels."""
    return module(batch).tanh().exp().mean()


def inputs():
    """16 samples of 6 features, float64 like the probe's."""
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def share(variance, eps):
    """ρ = eps/(var + eps), as a mean over the places that one unit meets."""
    return eps / (variance + eps)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3])
def test_batchnorm_rows_meet_their_own_variance(scale):
    """For each row ρ follows from the variance of its output: near 0 for large weights, near 1 for small ones."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, eps=1e-4), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        net[0].weight.mul_(scale)
    rho = share((inputs() @ net[0].weight.detach().double().T).var(0, correction=0), 1e-4)
    verdict = find_scale_invariance(net, inputs(), forward=loss)["0.weight"]
    assert verdict.rho_median == pytest.approx(float(rho.median()), rel=CLOSE)
    assert verdict.rho_worst == pytest.approx(float(rho.max()), rel=CLOSE)


def test_layernorm_meets_the_variance_of_every_sample():
    """One unit, 16 samples: the mean of their shares, with the bias in the variance."""
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5, eps=1e-2), nn.Tanh(), nn.Linear(5, 3))
    y = inputs() @ net[0].weight.detach().double().T + net[0].bias.detach().double()
    expected = float(share(y.var(1, correction=0), 1e-2).mean())
    verdict = find_scale_invariance(net, inputs(), forward=loss)["0.weight"]
    assert verdict.needs_bias == "0.bias"
    assert (verdict.rho_median, verdict.rho_worst) == pytest.approx((expected, expected), rel=CLOSE)


class HandWritten(nn.Module):
    """RMSNorm in plain operators, with its eps as it comes."""

    def __init__(self, eps) -> None:
        super().__init__()
        self.first, self.eps, self.last = nn.Linear(6, 5, bias=False), eps, nn.Linear(5, 3)

    def forward(self, x):
        """Normalize by hand."""
        y = self.first(x)
        return self.last(y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps))


def test_a_norm_written_by_hand_is_read_as_well():
    """The eps is what is added to the mean square."""
    net = HandWritten(1e-3)
    expected = float(share((inputs() @ net.first.weight.detach().double().T).square().mean(1), 1e-3).mean())
    assert find_scale_invariance(net, inputs(), forward=loss)["first.weight"].rho_worst == pytest.approx(
        expected, rel=CLOSE
    )


def test_each_weight_gets_the_share_of_its_own_norm():
    """Of two layers in a row, each in front of another norm, neither hears of the other's eps."""
    net = nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.RMSNorm(5, eps=1e-3), nn.Tanh(),
        nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, eps=1e-4), nn.Linear(4, 3),
    )  # fmt: skip
    y = inputs() @ net[0].weight.detach().double().T
    first = share(y.square().mean(1), 1e-3)
    z = (y * (y.square().mean(1, keepdim=True) + 1e-3).rsqrt()).tanh() @ net[3].weight.detach().double().T
    second = share(z.var(0, correction=0), 1e-4)
    verdicts = find_scale_invariance(net, inputs(), forward=loss)
    assert verdicts["0.weight"].rho_worst == pytest.approx(float(first.mean()), rel=CLOSE)
    assert verdicts["3.weight"].rho_worst == pytest.approx(float(second.max()), rel=CLOSE)


def test_the_share_is_the_degree_of_the_output():
    """By its meaning: at ρ = 0.5 a weight that grows by 1 % moves the normalized output by half a percent."""
    net = nn.Sequential(nn.Linear(6, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    x = inputs()
    variance = float((x @ net[0].weight.detach().double().T).var(0, correction=0))
    net[1].eps = 1e-3
    with torch.no_grad():
        net[0].weight.mul_((1e-3 / variance) ** 0.5)
    rho = find_scale_invariance(net, x, forward=lambda m, b: m(b).exp().mean())["0.weight"].rho_worst
    net.double()
    before = net(x).detach().std()
    with torch.no_grad():
        net[0].weight.mul_(1.01)
    degree = float((net(x).detach().std() / before).log()) / torch.tensor(1.01).double().log().item()
    # float32 weights put the variance at eps only to 1e-7; the finite step adds 1 % of the slope dρ/dlog a = -0.5.
    assert rho == pytest.approx(0.5, abs=1e-6)
    assert degree == pytest.approx(rho, abs=0.5 * 0.01)


def test_exact_invariance_has_no_share():
    """A weight that is divided by its norm meets no eps at all."""
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))
    verdict = find_scale_invariance(net, inputs(), forward=loss)["0.parametrizations.weight.original1"]
    assert (verdict.rho_median, verdict.rho_worst) == (0.0, 0.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_norms_are_read_where_they_can_be(reentrant):
    """Reentrant checkpointing hides the graph: then there is no share, rather than a wrong one."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = (
                nn.Linear(6, 6),
                nn.Sequential(nn.Linear(6, 5, bias=False), nn.RMSNorm(5, eps=1e-3)),
            )
            self.last = nn.Linear(5, 3)

        def forward(self, x):
            return self.last(checkpoint(self.inner, self.first(x), use_reentrant=reentrant))

    net = Checkpointed()
    verdict = find_scale_invariance(net, inputs(), forward=loss)["inner.0.weight"]
    hidden = (net.first.double()(inputs()).detach() @ net.inner[0].weight.detach().double().T).square().mean(1)
    expected = None if reentrant else pytest.approx(float(share(hidden, 1e-3).mean()), rel=CLOSE)
    assert verdict.kind == "layer"
    assert verdict.rho_worst == expected


class Standardized(nn.Linear):
    """Rows of mean 0 and variance 1, in one of the ways that people write."""

    def __init__(self, how) -> None:
        super().__init__(6, 5)
        self.how = how

    def forward(self, x):
        """Linear layer with the standardized weight."""
        w, eps = self.weight, 1e-5
        if self.how == "batch_norm":  # as in timm
            w = nn.functional.batch_norm(self.weight.T, None, None, training=True, eps=eps).T
        elif self.how == "variance":
            w = (w - w.mean(1, keepdim=True)) * torch.rsqrt(w.var(1, keepdim=True, correction=0) + eps)
        elif self.how == "deviation":
            w = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + eps)
        return nn.functional.linear(x, w, self.bias)


@pytest.mark.parametrize("how", ["batch_norm", "variance", "deviation", "not"])
def test_weight_standardization_is_noticed(how):
    """However it is written; a BatchNorm behind the layer is none."""
    net = nn.Sequential(Standardized(how), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    for dtype in ("float64", "float32"):
        verdicts = find_scale_invariance(net, inputs(), forward=loss, dtype=dtype)
        assert verdicts["0.weight"].standardized == (how != "not")
        assert not verdicts["3.weight"].standardized
