"""Answers of a model to a benchmark's questions, in the file that the benchmark's judge takes.

    python -m remax.answers --model M --benchmark alpaca_eval --questions alpaca_eval.json --output answers/M.json

docs/evaluation.md shows the way from there to a win rate; `torchrun -m remax.answers ...` shares the questions among
several GPUs.
"""

from remax.cli.entry import run_main


def main() -> None:
    """Parses the flags and runs the program."""
    from remax.cli.evaluation import parse_answers

    args = parse_answers()
    from remax.stages.answers import run_answers  # seconds of imports, which a wrong flag need not wait for

    run_answers(args)


if __name__ == "__main__":
    run_main(main)
