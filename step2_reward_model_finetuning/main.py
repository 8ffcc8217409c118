"""Step 2: a reward model from preference pairs, or with --loss dpo a policy straight from them.

`deepspeed main.py --help` lists the flags; `remax/stages/finetune.py` holds the way from them to the trained model.
"""

from utils.run import run_main


def main() -> None:
    """Parses the flags and runs the stage."""
    from remax.cli.validate import parse_step2  # here, where Ctrl-C ends it without a traceback

    args = parse_step2()
    from remax.stages.finetune import run_finetuning  # seconds of imports, which a wrong flag need not wait for

    run_finetuning(args)


if __name__ == "__main__":
    run_main(main)
