"""A pre-norm transformer: nothing in it is scale-invariant by itself, all that writes to its stream is together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from lightning_normreg._compat import pl
from lightning_normreg._param_groups import DecayGroupsMixin
from lightning_normreg.demos._data import CHARACTERS

LAST = 0.1  # learning rate at the end, as a share of the peak
STD = 0.02  # of the initial matrices
EPS = 1e-7  # of the norms: at first 0.025 % of the stream's mean square, STD². torch's own depends on the precision


class DemoTransformer(DecayGroupsMixin, pl.LightningModule):
    """A language model of characters, as Llama is built: RMSNorm before each branch, rotary positions, no biases.

    Trained by AdamW with a linear warm-up, then a cosine to a tenth of the learning rate. Matrices are decayed, the
    gains of the norms are not. Embedding, attention outputs (``o``) and MLP outputs (``down``) write to the residual
    stream, which is normalized wherever it is read: these matrices are scale-invariant together.

    Args:
        lr: Learning rate at its peak.
        weight_decay: Decay of all matrices, the embedding included.
        warm_up: Steps of the warm-up, at most half of the run.
        width: Size of the residual stream.
        layers: Number of blocks of attention and MLP.
        heads: Attention heads, each of ``width / heads`` entries, an even number.

    Raises:
        ValueError: If ``width`` is no multiple of twice ``heads``.
    """

    def __init__(
        self,
        lr: float = 4e-3,
        weight_decay: float = 0.5,
        warm_up: int = 50,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"`width` must be a multiple of twice `heads`, got {width} and {heads}. Use 64 and 4.")
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.warm_up = lr, weight_decay, warm_up
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, EPS)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next characters, shape ``(N, T, 96)``, for tokens of shape ``(N, T)``."""
        stream = self.embedding(tokens)
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch, in nats per character."""
        return self._logged("train_loss", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the same."""
        self._logged("val_loss", batch)

    def _logged(self, name: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        loss = nn.functional.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
        self.log(name, loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW on groups in which the matrices decay, with a schedule by step."""
        optimizer = torch.optim.AdamW(self.decay_groups(self.weight_decay), lr=self.lr, betas=(0.9, 0.95))
        steps: Any = self.trainer.estimated_stepping_batches  # infinite where nothing ends the run: then no cosine
        warm_up = max(1, int(min(self.warm_up, steps / 2)))
        parts = [
            LinearLR(optimizer, start_factor=1 / warm_up, total_iters=warm_up),
            CosineAnnealingLR(optimizer, T_max=max(1, steps - warm_up), eta_min=LAST * self.lr),
        ]
        schedule = SequentialLR(optimizer, parts, milestones=[warm_up])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Block(nn.Module):
    """Attention, then a gated MLP, each read from the normalized stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, EPS), nn.RMSNorm(width, EPS)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        x = self.norm1(stream)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        read = nn.functional.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        stream = stream + self.o(read.transpose(1, 2).flatten(2))
        x = self.norm2(stream)
        branch: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return stream + branch


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions: pairs of entries, shape ``(…, T, entries)``, turned by their position times a frequency."""
    length, half = x.shape[-2], x.shape[-1] // 2
    place, pair = (torch.arange(n, dtype=x.dtype, device=x.device) for n in (length, half))
    angles = torch.outer(place, 10000.0 ** (-pair / half))
    first, second = x.chunk(2, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos())
    return torch.cat(turned, dim=-1)
