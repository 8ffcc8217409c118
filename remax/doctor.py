"""Is the pipeline sound before it trains? A few seconds of checks on the live models, each with its figure and remedy.

    python -m remax.doctor --actor_model_name_or_path A --reward_model_name_or_path R [--data_path D] [--json]

The checks are in `remax.checks`; step 3 runs them on its own engines before the first step.
"""

from remax.cli.entry import run_main


def main() -> None:
    """Prints the report; exits with status 1 after a failure."""
    from remax.cli.evaluation import parse_doctor

    args = parse_doctor()
    from remax.stages.doctor import run_doctor  # seconds of imports, which a wrong flag need not wait for

    run_doctor(args)


if __name__ == "__main__":
    run_main(main)
