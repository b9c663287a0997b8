"""The monitors added to a Trainer and a model that know nothing of this package."""

import torch
from pytorch_lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import EffectiveLRMonitor, WeightNormMonitor


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


if __name__ == "__main__":
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    data = DataLoader(TensorDataset(images.float() / 16, labels), batch_size=50, shuffle=True)
    monitors = [WeightNormMonitor(), EffectiveLRMonitor(every_n_steps=10)]
    trainer = Trainer(max_epochs=5, callbacks=monitors, accelerator="cpu", enable_model_summary=False)
    trainer.fit(Model(), data)
    print(monitors[1].history()[["step", "weights/effective_lr/net.0.weight", "weights/rotation/net.0.weight"]])
