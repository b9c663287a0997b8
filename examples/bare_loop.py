"""Plain PyTorch, without a Trainer: curves of each layer, and norms held, around the optimizer's own steps."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import find_scale_invariance
from lightning_normreg.steps import Projector, RotationTracker, StepDispatcher, tags, watch


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    data = DataLoader(TensorDataset(images.float() / 16, labels), batch_size=50, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    verdict = find_scale_invariance(model, next(iter(data)), forward=loss_of)
    watched = watch(model, verdict)
    rotation, projector = RotationTracker(watched), Projector([w for w in watched if w.invariant], "auto")
    projector.project(projector.targets)
    dispatcher = StepDispatcher()
    for subscriber in (rotation, projector):
        dispatcher.subscribe(subscriber)
    dispatcher.attach([optimizer])

    for step, batch in enumerate(batch for epoch in range(3) for batch in data):
        rotation.arm(step % 20 == 0)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        for tag, value in tags(rotation.collect()).items():
            print(f"{step:>4}  {tag:<32} {value:.3g}")
    dispatcher.remove()
    norms = model[0].weight.norm(dim=1)
    print(f"norms of the first layer: {norms.min():.6f} to {norms.max():.6f}")
