"""Releases: the content of a registered version, its bundle in S3, its version in MLflow."""
