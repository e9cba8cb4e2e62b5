"""Multi-Task Zipping: several pre-trained networks united into one that stores shared neurons once.

>>> zipped = mtz_core.zip_networks({"digits": a, "fashion": b}, calibration={"digits": x_a, "fashion": x_b})
>>> zipped(x, task="fashion")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtz_core.errors import MtzError
    from mtz_core.facade import zip_networks
    from mtz_core.merging.adding import add_network
    from mtz_core.network.operations import register_operation
    from mtz_core.network.tracing import trace
    from mtz_core.planning.search import Validation
    from mtz_core.settings import Budget, RetrainConfig, ZipConfig
    from mtz_core.zipped.module import ZippedNetwork, load
    from mtz_core.zipped.report import LayerReport, ZipReport

_HOMES = {
    "Budget": "settings",
    "LayerReport": "zipped.report",
    "MtzError": "errors",
    "RetrainConfig": "settings",
    "Validation": "planning.search",
    "ZipConfig": "settings",
    "ZipReport": "zipped.report",
    "ZippedNetwork": "zipped.module",
    "add_network": "merging.adding",
    "load": "zipped.module",
    "register_operation": "network.operations",
    "trace": "network.tracing",
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
    if name == "__version__":
        from importlib.metadata import version

        return version("mtz")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
