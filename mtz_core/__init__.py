"""Multi-Task Zipping: several pre-trained networks united into one that stores shared neurons once.

>>> zipped = mtz_core.zip_networks({"digits": a, "fashion": b}, calibration={"digits": x_a, "fashion": x_b})
>>> zipped(x, task="fashion")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtz_core.budget import Validation
    from mtz_core.errors import MtzError
    from mtz_core.facade import zip_networks
    from mtz_core.growth import add_network
    from mtz_core.operations import register_operation
    from mtz_core.settings import Budget, RetrainConfig, ZipConfig
    from mtz_core.structure import LayerReport, ZipReport
    from mtz_core.tracing import trace
    from mtz_core.zipped import ZippedNetwork, load

_HOMES = {
    "Budget": "settings",
    "LayerReport": "structure",
    "MtzError": "errors",
    "RetrainConfig": "settings",
    "Validation": "budget",
    "ZipConfig": "settings",
    "ZipReport": "structure",
    "ZippedNetwork": "zipped",
    "add_network": "growth",
    "load": "zipped",
    "register_operation": "operations",
    "trace": "tracing",
    "zip_networks": "facade",
}

__all__ = [
    "Budget",
    "LayerReport",
    "MtzError",
    "RetrainConfig",
    "Validation",
    "ZipConfig",
    "ZipReport",
    "ZippedNetwork",
    "add_network",
    "load",
    "register_operation",
    "trace",
    "zip_networks",
]


def __getattr__(name: str) -> Any:
    """Import a part of the façade when it is first asked for: settings and errors come without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
