"""Multi-Task Zipping: several pre-trained networks united into one that stores shared neurons once.

>>> import mtz_core as mtz
>>> zipped = mtz.zip_networks({"digits": a, "fashion": b}, calibration={"digits": x_a, "fashion": x_b})
>>> zipped(x, task="fashion")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtz_core.errors import (
        IncompatibleNetworks,
        InvalidCalibration,
        InvalidConfig,
        InvalidWeights,
        InvalidZippedFile,
        MtzError,
        UnsupportedModule,
        ZipWarning,
    )
    from mtz_core.facade import Evaluation, Progress, evaluate, retrain, zip_networks
    from mtz_core.merging.adding import add_network
    from mtz_core.network.operations import Operation, along, movement, pointwise, reduction, register_operation, window
    from mtz_core.network.tracing import trace
    from mtz_core.planning.search import Validation
    from mtz_core.retraining import RetrainStep, Targets
    from mtz_core.settings import Budget, Output, RetrainConfig, ZipConfig
    from mtz_core.statistics.linalg import SingularHessian
    from mtz_core.zipped.module import ZippedNetwork, load
    from mtz_core.zipped.report import LayerReport, TaskReport, ZipReport

    __version__: str

_HOMES = {
    "Budget": "settings",
    "Evaluation": "facade",
    "IncompatibleNetworks": "errors",
    "InvalidCalibration": "errors",
    "InvalidConfig": "errors",
    "InvalidWeights": "errors",
    "InvalidZippedFile": "errors",
    "LayerReport": "zipped.report",
    "MtzError": "errors",
    "Operation": "network.operations",
    "Output": "settings",
    "Progress": "facade",
    "RetrainConfig": "settings",
    "RetrainStep": "retraining",
    "SingularHessian": "statistics.linalg",
    "Targets": "retraining",
    "TaskReport": "zipped.report",
    "UnsupportedModule": "errors",
    "Validation": "planning.search",
    "ZipConfig": "settings",
    "ZipReport": "zipped.report",
    "ZipWarning": "errors",
    "ZippedNetwork": "zipped.module",
    "add_network": "merging.adding",
    "along": "network.operations",
    "evaluate": "facade",
    "load": "zipped.module",
    "movement": "network.operations",
    "pointwise": "network.operations",
    "reduction": "network.operations",
    "register_operation": "network.operations",
    "retrain": "facade",
    "trace": "network.tracing",
    "window": "network.operations",
    "zip_networks": "facade",
}

__all__ = [
    "Budget",
    "Evaluation",
    "IncompatibleNetworks",
    "InvalidCalibration",
    "InvalidConfig",
    "InvalidWeights",
    "InvalidZippedFile",
    "LayerReport",
    "MtzError",
    "Operation",
    "Output",
    "Progress",
    "RetrainConfig",
    "RetrainStep",
    "SingularHessian",
    "Targets",
    "TaskReport",
    "UnsupportedModule",
    "Validation",
    "ZipConfig",
    "ZipReport",
    "ZipWarning",
    "ZippedNetwork",
    "add_network",
    "along",
    "evaluate",
    "load",
    "movement",
    "pointwise",
    "reduction",
    "register_operation",
    "retrain",
    "trace",
    "window",
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


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
