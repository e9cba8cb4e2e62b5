"""Layout of a data set on disk: a file or folder for each split, and the names of its columns."""

SPLITS = ("train", "validation", "test")

SUFFIXES = (".parquet", ".arrow")
"""Allowed suffixes of a split's file."""

SAVED = ".arrow"
"""Suffix of the files in a split's folder."""

SAVED_STATE = "state.json"
"""File in a split's folder that names the others, if `save_to_disk` of Hugging Face datasets wrote the folder."""

IMAGE, INPUT, LABEL = "image", "input", "label"

LABEL_OF = "label."
"""What the names of columns begin with that hold the labels of one of several outputs."""
