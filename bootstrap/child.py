"""`child.py PROGRAM ARGUMENT...` runs a Python program that ends when standard input closes, and so with its parent."""

import os
import runpy
import sys
import threading


def _watch():
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_watch, daemon=True).start()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
