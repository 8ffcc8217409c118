"""What will step 3 hold in memory, which batch fits, which settings are to be taken, how long? Nothing is loaded.

python -m remax.plan --model Llama-2-7b --gpus 4 --gpu_memory 80 --algo remax ppo
"""

from remax.cli.entry import run_main


def main() -> None:
    """Prints the plan; exits with status 1 where nothing fits."""
    from remax.cli.planning import parse_plan

    args = parse_plan()
    from remax.stages.plan import run_plan  # seconds of imports, which a wrong flag need not wait for

    run_plan(args)


if __name__ == "__main__":
    run_main(main)
