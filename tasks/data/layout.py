"""Layout of a data set on disk: a file for each split, and the names of its columns."""

SPLITS = ("train", "validation", "test")

SUFFIXES = (".parquet", ".arrow")
"""Allowed suffixes of a split's file."""

IMAGE, INPUT, LABEL = "image", "input", "label"
