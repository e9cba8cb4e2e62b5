"""Prefect flows and commands that decide when and where the stages run."""
