#!/bin/sh
# pytest 9.2.0 adds its capturing handlers to every logger that does not propagate. PyTorch 2.13.0 takes a handler of its
# logger "torch.__trace" for the wish to have a structured trace. So every torch.export inside a test describes its
# inputs, each with the whole Python stack, symbolised, and the same export outside a test does not. Where the stack is as
# deep as in a test, that was a tenth of the CPU time of tests that export small networks.
#
# Expected: an export in a test writes as many trace records as in a plain script, none. Seen: three for one input.
# Remedy: logging.getLogger("torch.__trace").propagate = True in conftest.py, or `-p no:logging`.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 pytest==9.2.0 numpy

cat >"$folder/count.py" <<'PY'
import logging

import torch


def records() -> int:
    """How many trace records exporting one layer makes."""
    made = []
    factory = logging.getLogRecordFactory()

    def counting(name, *arguments, **named):
        made.append(name)
        return factory(name, *arguments, **named)

    logging.setLogRecordFactory(counting)
    try:
        torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
    finally:
        logging.setLogRecordFactory(factory)
    return made.count("torch.__trace")
PY
cat >"$folder/test_count.py" <<'PY'
import count


def test_records():
    count.records()  # torch looks once whether a trace is wanted
    print("\nin a test:", count.records())

PY
cd "$folder"
outside=$("$folder/venv/bin/python" -c 'import count; count.records(); print(count.records())')
inside=$("$folder/venv/bin/python" -m pytest -q -s test_count.py::test_records | sed -n 's/^in a test: //p')
echo 'import logging, torch; logging.getLogger("torch.__trace").propagate = True' >conftest.py
mended=$("$folder/venv/bin/python" -m pytest -q -s test_count.py::test_records | sed -n 's/^in a test: //p')
echo "trace records of one export: $outside in a script, $inside in a test, $mended in a test with the remedy"
[ "$outside" -eq 0 ] && [ "$inside" -eq 3 ] && [ "$mended" -eq 0 ]
