"""Lightning Fabric: the same objects, with accumulation and a logger; change `devices` and `precision` as you like."""

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg import find_scale_invariance
from lightning_normreg.steps import Projector, RotationTracker, StepDispatcher, tags, watch


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed", loggers=CSVLogger("fabric_logs"))
    fabric.launch()
    fabric.seed_everything(0)
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    data = DataLoader(TensorDataset(images.float() / 16, labels), batch_size=50, shuffle=True)
    plain = nn.Sequential(nn.Linear(64, 32, bias=False), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))
    verdict = find_scale_invariance(plain, next(iter(data)), forward=loss_of)  # before it is set up

    model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1))
    data = fabric.setup_dataloaders(data)
    watched = watch(model, verdict)
    rotation, projector = RotationTracker(watched), Projector([w for w in watched if w.invariant], "initial")
    projector.project(projector.targets)
    dispatcher = StepDispatcher()
    for subscriber in (rotation, projector):
        dispatcher.subscribe(subscriber)
    dispatcher.attach([optimizer])

    for number, batch in enumerate(data):
        steps = number % 2 == 1  # two batches make a step
        rotation.arm(steps and number % 10 == 9)
        with fabric.no_backward_sync(model, enabled=not steps):
            fabric.backward(loss_of(model, batch) / 2)
        if steps:
            optimizer.step()
            optimizer.zero_grad()
            values = tags(rotation.collect())
            if values:
                fabric.log_dict(values, step=number // 2)
                print(f"{number // 2:>4}  rotation of the first layer {values['weights/rotation/0.weight']:.3g} rad")
    print(f"norm of the first layer: {plain[0].weight.norm():.6f}")
