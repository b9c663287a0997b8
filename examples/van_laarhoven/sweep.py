"""The grid in parallel, on any engine that joblib has or can be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

from examples.van_laarhoven.grid import Settings
from examples.van_laarhoven.store import Store
from examples.van_laarhoven.train import run_and_keep


def sweep(
    settings: Settings,
    store: Store,
    *,
    jobs: int,
    backend: str = "loky",
    address: str | None = None,
    archive: Path | None = None,
    device: str = "cpu",
) -> None:
    """Run the cells that have no result yet."""
    cells = settings.cells()
    missing = store.missing(cells)
    client = _connect(backend, address, jobs)
    try:
        with (
            tqdm(total=len(cells), initial=len(cells) - len(missing), unit="cell", smoothing=0.05) as bar,
            parallel_config(backend, n_jobs=jobs),
        ):
            parallel = _Showing(bar, batch_size=1)
            parallel(delayed(run_and_keep)(cell, settings, store, archive, device) for cell in missing)
    finally:
        if client is not None:
            client.close()


def _connect(backend: str, address: str | None, jobs: int) -> Any:
    """Make an engine known to joblib that is not its own: those of a running cluster, or a local one."""
    if backend == "dask":
        from dask.distributed import Client  # noqa: PLC0415  only whoever asks for it needs it

        return Client(address) if address else Client(n_workers=jobs, threads_per_worker=1)
    if backend == "ray":
        import ray  # noqa: PLC0415
        from ray.util.joblib import register_ray  # noqa: PLC0415

        ray.init(address=address, num_cpus=None if address else jobs)
        register_ray()
    return None


class _Showing(Parallel):  # type: ignore[misc]
    """Moves a bar whenever a cell is finished; all engines of joblib call this."""

    def __init__(self, bar: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self._bar, self._shown = bar, 0

    def print_progress(self) -> None:
        self._bar.update(self.n_completed_tasks - self._shown)
        self._shown = self.n_completed_tasks
