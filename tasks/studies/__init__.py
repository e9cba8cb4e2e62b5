"""Comparisons beside the pipeline: which models are alike, what size costs."""
