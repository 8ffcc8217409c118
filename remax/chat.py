"""A dialogue with a model in the terminal, or with two side by side.

    python -m remax.chat --model output/remax/actor --against output/sft --reward output/reward

An empty line or Ctrl-D leaves, Ctrl-C ends an answer, /help lists the commands.
"""

from remax.cli.entry import run_main


def main() -> None:
    """Parses the flags and runs the program."""
    from remax.cli.evaluation import parse_chat

    args = parse_chat()
    from remax.stages.chat import run_chat  # seconds of imports, which a wrong flag need not wait for

    run_chat(args)


if __name__ == "__main__":
    run_main(main)
