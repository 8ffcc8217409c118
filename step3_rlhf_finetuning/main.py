"""Step 3: reinforcement learning with ReMax (or --algo reinforce, rloo, grpo, ppo, raft, superhf, inpo).

`deepspeed main.py --help` lists the flags; `remax/stages/rlhf.py` holds the way from them to the trained policy.
"""

from utils.run import run_main


def main() -> None:
    """Parses the flags and runs the stage."""
    from remax.cli.validate import parse_step3  # here, where Ctrl-C ends it without a traceback

    args = parse_step3()
    from remax.stages.rlhf import run_rlhf  # seconds of imports, which a wrong flag need not wait for

    run_rlhf(args)


if __name__ == "__main__":
    run_main(main)
