"""How often one model's answers are preferred to another's, with intervals, and controlled for length.

    python -m remax.winrate answers/remax.json answers/sft.json --judge reward:output/reward

docs/evaluation.md says what each figure means.
"""

from remax.cli.entry import run_main


def main() -> None:
    """Parses the flags and runs the program."""
    from remax.cli.evaluation import parse_winrate

    args = parse_winrate()
    from remax.stages.winrate import run_winrate  # seconds of imports, which a wrong flag need not wait for

    run_winrate(args)


if __name__ == "__main__":
    run_main(main)
