"""``python -m examples.van_laarhoven``: run what is not finished yet, then write figures and report."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from examples.van_laarhoven.cifar10 import check_archive
from examples.van_laarhoven.grid import CIFAR10, DIGITS, TINY, Settings
from examples.van_laarhoven.store import Store
from examples.van_laarhoven.sweep import sweep

BACKENDS = ("loky", "multiprocessing", "threading", "sequential", "dask", "ray")
PACKAGES = {"dask": "dask[distributed]", "ray": "ray"}


def parse(args: list[str] | None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.van_laarhoven", description=__doc__)
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits", help="default: %(default)s")
    parser.add_argument("--archive", type=Path, help="your copy of cifar-10-python.tar.gz")
    parser.add_argument("--out", type=Path, help="folder of results; default: van_laarhoven_results/DATA")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, -1 for one a core; default: %(default)s")
    parser.add_argument("--backend", default="loky", choices=BACKENDS, help="engine of joblib; default: %(default)s")
    parser.add_argument("--address", help="scheduler of a running Dask or Ray cluster; default: a local one is started")
    parser.add_argument("--device", default="cpu", help="device of the cells; default: %(default)s")
    parser.add_argument("--seeds", type=int, help="number of seeds; results of fewer are used again")
    parser.add_argument("--epochs", type=int, help="epochs of a cell")
    parser.add_argument("--tiny", action="store_true", help="2×2 cells, 2 epochs: does everything work?")
    options = parser.parse_args(args)
    for name in ("seeds", "epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"`--{name}` must be at least 1, got {value}. Leave it out for the default.")
    if options.backend in PACKAGES and find_spec(options.backend) is None:
        parser.error(f"`--backend {options.backend}` needs a package: pip install '{PACKAGES[options.backend]}'.")
    if options.data == "cifar10":
        if options.archive is None:
            parser.error("`--data cifar10` needs `--archive`, the path of your copy of cifar-10-python.tar.gz.")
        try:
            check_archive(options.archive)
        except ValueError as error:
            parser.error(str(error))
        options.archive = options.archive.resolve()
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """Settings that the arguments ask for."""
    settings = CIFAR10 if options.data == "cifar10" else DIGITS
    if options.tiny:
        names = ("epochs", "lrs_sgd", "decays_sgd", "lrs_adam", "decays_adam", "seeds")
        settings = replace(settings, **{name: getattr(TINY, name) for name in names})
    if options.seeds:
        settings = replace(settings, seeds=tuple(range(options.seeds)))
    return replace(settings, epochs=options.epochs or settings.epochs)


def main(args: list[str] | None = None) -> int:
    """Run, and say where the report is."""
    options = parse(args)
    settings = settings_of(options)
    try:
        store = Store(options.out or Path("van_laarhoven_results") / settings.data, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    sweep(settings, store, jobs=options.jobs, backend=options.backend, address=options.address,
          archive=options.archive, device=options.device)  # fmt: skip
    print(f"All cells are finished, {time.monotonic() - started:.0f} s in this session.")
    from examples.van_laarhoven.report import write_report  # noqa: PLC0415  the workers need no matplotlib

    print(f"Report: {write_report(settings, store)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
