"""Where a test's services are, in place of the blocks of params.yaml."""

from dataclasses import dataclass

from tasks.registry import mlflow_client
from tasks.storage import s3


@dataclass(frozen=True)
class Place:
    """Where a storage is, as `params.storage` says it."""

    endpoint: str = s3.EMBEDDED
    bucket: str = "mtz-tests"
    prefix: str = "project"
    region: str = "us-east-1"


@dataclass(frozen=True)
class Registry:
    """Where an MLflow registry is, as `params.tracking` says it."""

    uri: str = mlflow_client.EMBEDDED
    experiment: str = "tests"
