"""Releases: what a registered version consists of, its bundle in S3, its version in MLflow."""
