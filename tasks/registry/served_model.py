"""The zipped network as an MLflow model; MLflow runs this file when the model is loaded, and nothing is unpickled.

Usage:

    model = mlflow.pyfunc.load_model("models:/NAME/VERSION")
    logits = model.predict(x, params={"task": "fashion"})
"""

from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

import mtz_core


class ServedNetwork(PythonModel):
    """A zipped network that runs one task per call."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the network that was logged with the model."""
        self._network = mtz_core.load(context.artifacts["network"])

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Run one task of the network.

        Args:
            context: Unused; MLflow passes it.
            model_input: The inputs, `[batch, *input_shape]`, float32.
            params: `task` names the task; by default the first one.

        Returns:
            The logits, `[batch, classes]`, float32.

        Raises:
            MtzError: The network does not have this task.
        """
        task = (params or {}).get("task", self._network.tasks[0])
        with torch.inference_mode():
            return self._network(torch.tensor(model_input), task=task).numpy()


set_model(ServedNetwork())
