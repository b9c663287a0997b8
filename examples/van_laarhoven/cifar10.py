"""CIFAR-10 from a local copy of its archive. Nothing is downloaded, and nothing in the archive is executed."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MD5 = "c58f30108f718f92721af3b95e74349a"
_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_REMEDY = f"Download {_URL} (163 MB, md5 {MD5}) and give its path by `--archive`."
_FOLDER = "cifar-10-batches-py"
_TRAIN, _TEST = [f"data_batch_{k}" for k in range(1, 6)], ["test_batch"]
_NEEDED = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct")}


class Archive(NamedTuple):
    """Images, uint8 of shape ``(N, 3, 32, 32)``, and labels, int64 of shape ``(N,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def check_archive(path: Path, md5: str = MD5) -> None:
    """Raise a ``ValueError`` that names the remedy, unless there is an archive with this md5."""
    if not path.is_file():
        raise ValueError(f"`archive` must be the file cifar-10-python.tar.gz, got {path}, which is no file. {_REMEDY}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest() if hasattr(hashlib, "file_digest") else _md5(file)
    if found != md5:
        raise ValueError(f"`archive` must have the md5 {md5}, got {found} of {path}: it is cut off or not the Python "
                         f"version of CIFAR-10. {_REMEDY}")  # fmt: skip


def _md5(file: Any) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def read_archive(path: Path, md5: str = MD5) -> Archive:
    """Read the archive, once per process.

    Raises:
        ValueError: If the file, its md5 or what is in it is not that of CIFAR-10, with the remedy.
    """
    check_archive(path, md5)
    try:
        with tarfile.open(path, "r:gz") as archive:
            train, test = ([_batch(archive, name) for name in names] for names in (_TRAIN, _TEST))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"`archive` must be a gzipped tar file, got {path}: {error}. {_REMEDY}") from error
    images, labels = ([torch.cat([b[k] for b in part]) for part in (train, test)] for k in (0, 1))
    return Archive(images[0], labels[0], images[1], labels[1])


def _batch(archive: tarfile.TarFile, name: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one of the pickled batches."""
    try:
        file = archive.extractfile(f"{_FOLDER}/{name}")
    except KeyError:
        file = None
    if file is None:
        raise ValueError(f"`archive` must hold the file {_FOLDER}/{name}, which is not in it. {_REMEDY}")
    try:
        batch = _ArraysOnly(io.BytesIO(file.read()), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], dtype=np.int64)
    except Exception as error:  # a pickle that is broken, or none of ours, fails in any way it likes
        raise ValueError(f"`archive` must hold a batch of images in {name}, got {error}. {_REMEDY}") from error
    good = images.dtype == np.uint8 and images.shape == (len(labels), 3072) and labels.ndim == 1
    if not good or not ((labels >= 0) & (labels < 10)).all():
        raise ValueError(f"`archive` must hold uint8 images of 3072 values with labels 0 to 9, got {images.dtype} "
                         f"{images.shape} and labels {labels.shape} in {name}. {_REMEDY}")  # fmt: skip
    return torch.from_numpy(images.reshape(-1, 3, 32, 32).copy()), torch.from_numpy(labels)


class _ArraysOnly(pickle.Unpickler):
    """Loads what the batches hold, and no other global: a pickle can name any function of any module, and call it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) not in _NEEDED:
            raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}, which CIFAR-10 has no use for")
        if name == "_reconstruct":  # its module has moved in NumPy 2
            return np.empty(0).__reduce__()[0]
        return super().find_class(module, name)
