"""How the programs that are started by `python -m remax.PROGRAM` begin and end: `run_main`, as the stages have it.

`python -m` looks into the working folder first, so a user's own `utils` there would hide this project's. That is said
here, once for all of them.
"""

import sys

try:
    from utils.run import run_main
except ModuleNotFoundError:
    import utils

    place = getattr(utils, "__file__", None) or list(utils.__path__)
    print(
        f"error: {place} hides the package `utils` of remax; start from another folder, or rename it", file=sys.stderr
    )
    sys.exit(2)

__all__ = ["run_main"]
