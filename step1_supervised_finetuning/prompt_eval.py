"""Answers of a model to prompts, or of two models to the same prompts, before and after training.

`python prompt_eval.py --help` lists the flags; `remax/stages/prompt_eval.py` holds the way from them to the answers.
"""

from utils.run import run_main


def main() -> None:
    """Parses the flags and runs the program."""
    from remax.cli.evaluation import parse_prompt_eval  # here, where Ctrl-C ends it without a traceback

    args = parse_prompt_eval()
    from remax.stages.prompt_eval import run_prompt_eval  # seconds of imports, which a wrong flag need not wait for

    run_prompt_eval(args)


if __name__ == "__main__":
    run_main(main)
