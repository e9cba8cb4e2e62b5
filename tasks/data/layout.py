"""How a data set lies on disk: a file for each split, and the names of its columns."""

SPLITS = ("train", "validation", "test")

SUFFIXES = (".parquet", ".arrow")
"""What the file of a split may end with."""

IMAGE, INPUT, LABEL = "image", "input", "label"
