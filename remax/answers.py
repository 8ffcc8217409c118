"""Answers of a model to a benchmark's questions, in the file that the benchmark's judge takes.

    python -m remax.answers --model M --benchmark alpaca_eval --questions alpaca_eval.json --output answers/M.json

docs/evaluation.md shows the way from there to a win rate; `torchrun -m remax.answers ...` shares the questions among
several GPUs.
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
    from remax.cli.evaluation import parse_answers

    args = parse_answers()
    from remax.stages.answers import run_answers  # seconds of imports, which a wrong flag need not wait for

    run_answers(args)


if __name__ == "__main__":
    run_main(main)
