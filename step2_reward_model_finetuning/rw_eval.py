"""Scores of a reward model: for every row of a file, or for two built-in examples.

`python rw_eval.py --help` lists the flags; `remax/stages/reward_eval.py` holds the way from them to the scores.
"""

from utils.run import run_main


def main() -> None:
    """Parses the flags and runs the program."""
    from remax.cli.evaluation import parse_reward_eval  # here, where Ctrl-C ends it without a traceback

    args = parse_reward_eval()
    from remax.stages.reward_eval import run_reward_eval  # seconds of imports, which a wrong flag need not wait for

    run_reward_eval(args)


if __name__ == "__main__":
    run_main(main)
