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
from mtz_core.batches import flattened, tensors_of


class ServedNetwork(PythonModel):
    """A zipped network that runs one task per call."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the network that was logged with the model."""
        self._network = mtz_core.load(context.artifacts["network"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,  # or a dict of them; of such types MLflow warns
        params: dict[str, Any] | None = None,
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Run one task of the network.

        Args:
            context: Unused; MLflow passes it.
            model_input: The inputs, `[batch, *input_shape]`, float32; several by name.
            params: `task` names the task; by default the first one.

        Returns:
            The outputs, `[batch, …]`, float32; several by name.

        Raises:
            MtzError: The network does not have this task.
        """
        task = (params or {}).get("task", self._network.tasks[0])
        given = (
            {name: torch.tensor(values) for name, values in model_input.items()}
            if isinstance(model_input, dict)
            else torch.tensor(model_input)
        )
        with torch.inference_mode():
            outputs = {n: own.numpy() for n, own in tensors_of(flattened(self._network(given, task=task))).items()}
        return outputs.get("", outputs)


set_model(ServedNetwork())
