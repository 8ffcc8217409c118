"""What will step 3 hold in memory, which batch fits, which settings are to be taken? Nothing is loaded.

python -m remax.plan --model Llama-2-7b --gpus 4 --gpu_memory 80 --algo remax ppo
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
    """Prints the plan; exits with status 1 where nothing fits."""
    from remax.cli.planning import parse_plan

    args = parse_plan()
    from remax.stages.plan import run_plan  # seconds of imports, which a wrong flag need not wait for

    run_plan(args)


if __name__ == "__main__":
    run_main(main)
