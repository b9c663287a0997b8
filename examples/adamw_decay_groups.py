"""AdamW that decays weights only: gains, shifts and biases are in groups of their own, each with its name."""

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import DecayGroupsMixin, EffectiveLRMonitor


class Model(DecayGroupsMixin, LightningModule):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(8, 8))
        self.rows = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU())
        self.head = nn.Linear(32, 10)

    def training_step(self, batch, batch_idx):
        features = self.rows(batch[0].unflatten(1, (8, 8)) + self.position).mean(dim=1)
        return nn.functional.cross_entropy(self.head(features), batch[1])

    def configure_optimizers(self):
        groups = self.decay_groups(0.05, overrides={"position": 0.0})
        for group in groups:
            print(f"{group['name']:<10} decay {group['weight_decay']:<5g} {group['param_names']}")
        return torch.optim.AdamW(groups, lr=1e-3)


if __name__ == "__main__":
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    data = DataLoader(TensorDataset(images.float() / 16, labels), batch_size=50, shuffle=True)
    monitors = [EffectiveLRMonitor(), LearningRateMonitor(log_weight_decay=True)]
    Trainer(max_epochs=3, callbacks=monitors, accelerator="cpu", enable_model_summary=False).fit(Model(), data)
