"""Comparisons beside the pipeline: which models are alike, and what a size costs."""
