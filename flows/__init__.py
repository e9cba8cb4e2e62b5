"""Prefect flows that decide when and where the stages run."""
