#!/bin/sh
# safetensors 0.8.0 raises FileNotFoundError, "No such file or directory", for a file that is there, but that this user may
# not read. Python's own open() raises PermissionError for it. Whoever fetches weights where they are missing fetches them
# again, over a file that somebody else's job needs, or tells the operator of a nightly run to look for a lost file.
#
# Expected: PermissionError from safe_open and load_file, too. Seen: FileNotFoundError from both.
# Remedy: open the file with Python's open() first, and close it again.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6

cat >"$folder/read.py" <<'PY'
import os
import sys
from collections.abc import Callable

import numpy
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

path = os.path.join(sys.argv[1], "weights.safetensors")
save_file({"weight": numpy.zeros(2, dtype="f")}, path)
os.chmod(sys.argv[1], 0o755)
os.chmod(path, 0)
if os.geteuid() == 0:  # who may read everything
    os.seteuid(65534)


def error(reading: Callable[[], object]) -> str:
    """The kind of error that reading the file raises."""
    try:
        reading()
    except OSError as raised:
        return type(raised).__name__
    return "none"


print(error(lambda: open(path, "rb")), error(lambda: safe_open(path, "numpy").__enter__()), error(lambda: load_file(path)))
PY
seen=$("$folder/venv/bin/python" "$folder/read.py" "$folder")
echo "open: ${seen%% *}; safe_open and load_file: ${seen#* }"
[ "$seen" = "PermissionError FileNotFoundError FileNotFoundError" ]
