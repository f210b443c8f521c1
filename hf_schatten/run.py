"""Runs an unmodified script with ``--optim schatten_p`` available: ``python -m hf_schatten.run SCRIPT.py …``.

Also ``-m MODULE …`` for a module, and behind ``accelerate launch -m`` or ``torchrun -m``. The import of the package
registers the optimizer; the script needs no change.
"""

from __future__ import annotations

import os
import runpy
import sys

_USAGE = (
    "usage: python -m hf_schatten.run SCRIPT.py [ARGUMENT …]\n       python -m hf_schatten.run -m MODULE [ARGUMENT …]"
)


def main() -> None:
    """Run the script or module named on the command line as ``__main__``, with the rest as its arguments."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments and not arguments[0].startswith("-"):
        sys.argv = arguments
        # As `python SCRIPT.py` does: modules beside the script are importable.
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        sys.exit(_USAGE)


if __name__ == "__main__":
    main()
