"""The full MNIST and Fashion-MNIST sets in IDX format, which the repository does not hold (see data/README.md)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.build import read_idx
from mtz_core.evaluation import error_rate, predict

FOLDERS = {"digits": "mnist", "fashion": "fashion-mnist"}


@dataclass(frozen=True)
class Split:
    """Images ``[n, 1, 28, 28]``, pixels from 0 to 1, and their labels ``[n]``."""

    images: Tensor
    labels: Tensor


def data_folder(parser: argparse.ArgumentParser) -> Path:
    """The folder of both sets; ends the program with the remedy if they are not there."""
    folder = Path(os.environ.get("MTZ_FULL_DATA", "../shared/data"))
    if not (folder / FOLDERS["digits"]).is_dir():
        parser.error(
            f"the full data sets are not in {folder}: set MTZ_FULL_DATA to the folder of both (data/README.md)"
        )
    return folder


def read_split(source: Path, task: str, split: str) -> Split:
    """A full split (`train` or `t10k`) from its IDX files."""
    folder = source / FOLDERS[task]
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", 1)
    pixels = torch.from_numpy(np.array(images))[:, None].to(torch.float32).div_(255)
    return Split(pixels, torch.from_numpy(np.array(labels)).long())


def test_error(network: Callable[[Tensor], Tensor], test: Split) -> float:
    """Share of wrong predictions, in percent."""
    return error_rate(predict(network, torch.split(test.images, 500)), test.labels)
