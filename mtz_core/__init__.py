"""Multi-Task Zipping: several pre-trained networks united into one that stores shared neurons once.

>>> zipped = mtz_core.zip_networks({"digits": a, "fashion": b}, calibration={"digits": x_a, "fashion": x_b})
>>> zipped(x, task="fashion")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtz_core.errors import MtzError
    from mtz_core.growth import add_network
    from mtz_core.operations import register_operation
    from mtz_core.settings import ZipConfig
    from mtz_core.structure import LayerReport, ZipReport
    from mtz_core.tracing import trace
    from mtz_core.zipped import ZippedNetwork, load
    from mtz_core.zipping import zip_networks

_HOMES = {
    "LayerReport": "structure",
    "MtzError": "errors",
    "ZipConfig": "settings",
    "ZipReport": "structure",
    "ZippedNetwork": "zipped",
    "add_network": "growth",
    "load": "zipped",
    "register_operation": "operations",
    "trace": "tracing",
    "zip_networks": "zipping",
}

__all__ = [
    "LayerReport",
    "MtzError",
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
