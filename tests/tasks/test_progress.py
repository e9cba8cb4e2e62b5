"""What a stage says of itself."""

import subprocess
import sys

from tasks.progress import peak_memory

HELD = 300 << 20
STAGE = f"""
from tasks.progress import peak_memory

before = peak_memory()
held = b"1" * {HELD // 2}
print(before, peak_memory())
"""


def test_the_peak_of_a_stage_is_its_own_whatever_its_parent_holds() -> None:
    held = b"1" * HELD
    assert peak_memory() > len(held)
    command = ["sh", "-c", f"exec {sys.executable} -c '{STAGE}'"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = map(int, found.split())
    assert before < HELD / 2
    assert HELD / 2 < after < HELD
