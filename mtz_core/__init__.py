"""Multi-Task Zipping: several pre-trained networks united into one that stores shared neurons once.

>>> zipped = mtz_core.zip_networks({"digits": a, "fashion": b}, calibration={"digits": x_a, "fashion": x_b})
>>> zipped(x, task="fashion")
"""

from mtz_core.errors import MtzError
from mtz_core.settings import ZipConfig
from mtz_core.structure import LayerReport, ZipReport
from mtz_core.zipped import ZippedNetwork, load
from mtz_core.zipping import zip_networks

__all__ = ["LayerReport", "MtzError", "ZipConfig", "ZipReport", "ZippedNetwork", "load", "zip_networks"]
