"""What a step of each arm of a study costs, in turns: for a machine that did other work, or slept,
while the study trained.

    python tests/bench_study.py tricks [--rounds 20] [--arms base "add-*"]

Every arm is built as its first seed is; a round takes one step of each, at the same share of
training, so that schedules of shape count as often as they stand. Time is the process' own on a
CPU. Given: the median in ms, and its ratio to the base's of the same round, with the quartiles.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # noqa: E402
from logs import study  # noqa: E402


def make_trainer(cfg: tg.Config, folder: str) -> tg.Trainer:
    cfg.log_dir = folder
    run = tg.Run(cfg)
    run.prepare_machine()
    run.join_group()
    return tg.build(cfg, run)


def take_step(trainer: tg.Trainer, at: float) -> float:
    """The step at this share of training, with its averages; its milliseconds."""
    cfg = trainer.cfg
    step = math.floor(at * cfg.steps)
    now = trainer.plan.at(step, at)
    begun = time.process_time()
    tg.train_step(trainer, step, now)
    trainer.run.trained = now
    if tg.is_averaged(cfg):
        trainer.avg.update(step + 1, at)
    return 1000 * (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="a name in configs/studies/, or a path")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--arms", nargs="+", default=[], help="names or patterns")
    args = parser.parse_args()
    said = study.read_study(args.study)
    arms = study.chosen(said, args.arms)
    plan = study.Study("bench", said, arms, said.get("seeds", [1])[:1], [], [], Path("unused"))
    base = next(name for name, arm in arms.items() if not arm.against)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(plan.config(name, plan.seeds[0]), folder) for name in arms}
        for trainer in trainers.values():  # what a first step makes
            take_step(trainer, 0.0)
        spent = {name: [] for name in arms}
        for i in range(args.rounds):
            for name, trainer in trainers.items():
                spent[name].append(take_step(trainer, (i + 0.5) / args.rounds))
    print(f"{'arm':24} {'ms':>8}  of {base}'s, quartiles (n = {args.rounds})")
    for name, ms in spent.items():
        low, middle, high = statistics.quantiles((a / b for a, b in zip(ms, spent[base])), n=4)
        print(f"{name:24} {statistics.median(ms):8.1f}  {middle:.3f}  {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
