"""Entry point of every child process: runs a Python module in a process group that dies with its parent.

Run as a script, `python -P lifeline.py MODULE ARG…`, in a session of its own. Standard input is a pipe whose writing
end only the parent holds. However the parent ends, even by `kill -9`, the pipe closes and the group is killed: no stage
goes on writing into a workspace that a new run may already be using.
"""

import os
import runpy
import signal
import sys
import threading


def _die_with_parent(pipe: int) -> None:
    """Wait until the parent's end of the pipe is closed, then kill this process group."""
    while os.read(pipe, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run the module, or the `.py` file, that the first argument names, as `python -m` would."""
    pipe = os.dup(0)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - keeps the imports of a process that starts often few
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_die_with_parent, args=(pipe,), daemon=True).start()
    del sys.argv[0]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
