"""A dialogue with a model in the terminal, or with two side by side.

    python -m remax.chat --model output/remax/actor --against output/sft --reward output/reward

An empty line or Ctrl-D leaves, Ctrl-C ends an answer, /help lists the commands.
"""

import sys

try:
    from utils.run import run_main
except ModuleNotFoundError:  # `python -m` looks into the working folder first
    import utils

    place = getattr(utils, "__file__", None) or list(utils.__path__)
    print(
        f"error: {place} hides the package `utils` of remax; start from another folder, or rename it", file=sys.stderr
    )
    sys.exit(2)


def main() -> None:
    """Parses the flags and runs the program."""
    from remax.cli.evaluation import parse_chat

    args = parse_chat()
    from remax.stages.chat import run_chat  # seconds of imports, which a wrong flag need not wait for

    run_chat(args)


if __name__ == "__main__":
    run_main(main)
