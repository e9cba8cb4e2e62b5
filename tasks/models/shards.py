"""The files that hold a network's weights: one safetensors file, or a folder of them with or without an index."""

from __future__ import annotations

from pathlib import Path

from tasks.files import InvalidArtifact, read_json

WEIGHTS, INDEX = ".safetensors", ".safetensors.index.json"


def shards_of(index: Path) -> dict[str, str]:
    """Read an index of several safetensors files.

    Args:
        index: The index, as `save_pretrained` of transformers writes it.

    Returns:
        The file of each tensor, by the tensor's name.

    Raises:
        InvalidArtifact: It is missing, or is no index of files beside it.
    """
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(_is_beside(file) for file in shards.values()):
        raise InvalidArtifact(
            f"{index} is no index of safetensors files beside it: its weight_map should name the file of each tensor. "
            "Fetch it again."
        )
    return dict(shards)


def weight_files(path: Path) -> list[Path]:
    """Find the safetensors files that hold a network's weights.

    Args:
        path: A file, or a folder.

    Returns:
        That file, or all files of the folder.

    Raises:
        InvalidArtifact: There are none, the path is an index, or an index and the files beside it disagree.
    """
    if path.name.endswith(INDEX):
        raise InvalidArtifact(f"{path} is an index. Name its folder, {path.parent}, so that all files are versioned.")
    if not path.is_dir():
        return [path]
    there = sorted(file for file in path.iterdir() if file.name.endswith(WEIGHTS))
    for index in path.glob(f"*{INDEX}"):
        missing = sorted(set(shards_of(index).values()) - {file.name for file in there})
        if missing:
            raise InvalidArtifact(f"{path / missing[0]}: there is no such file, but {index.name} names it. Fetch it.")
        unnamed = [file.name for file in there if file.name not in shards_of(index).values()]
        if unnamed:
            raise InvalidArtifact(
                f"{path}: {index.name} does not name {unnamed[0]}, which lies beside it. Remove the one of the two "
                "that is not meant."
            )
    if not there:
        raise InvalidArtifact(f"{path} has no {WEIGHTS} file. Put the weights there, or correct the path.")
    return there


def _is_beside(file: object) -> bool:
    return isinstance(file, str) and file.endswith(WEIGHTS) and Path(file).name == file
