"""Two epochs at once, and one after the other over a distributed checkpoint, for ``test_strategies``.

``python sharded_resume.py FOLDER`` writes what each rank ends with, both ways.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import ModelParallelStrategy

from lightning_normreg import (
    CorrectedDecay,
    EffectiveLRMonitor,
    NormProjection,
    WeightNormMonitor,
    find_scale_invariance,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.callbacks.strategies import Model, data, whole_weights


def fit(epochs: int, *, resume: Path | None = None, save: Path | None = None) -> list[Any]:
    """Weights, and the histories of both monitors."""
    torch.manual_seed(0)
    model, copy = Model("fsdp", "adamw"), Model("single", "adamw")
    copy.load_state_dict(model.state_dict())
    loader = data(int(os.environ.get("LOCAL_RANK", "0")), 2, torch.float32)
    known: dict[str, Any] = {"invariance": find_scale_invariance(copy, next(iter(loader)))}
    monitors = [WeightNormMonitor(**known), EffectiveLRMonitor(**known)]
    changing = [NormProjection("initial", include=["second.weight"], **known), CorrectedDecay(**known)]
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1),
        max_epochs=epochs,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[*monitors, *changing],
    )
    trainer.fit(model, loader, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return [whole_weights(trainer, model), *(monitor.history().to_dict("records") for monitor in monitors)]


def main() -> None:
    """Three fits."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    whole = fit(2)
    fit(1, save=folder / "checkpoint")
    resumed = fit(2, resume=folder / "checkpoint")
    (folder / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps([whole, resumed]))


if __name__ == "__main__":
    main()
