"""
Speed of the cellular-automaton generator against the loop that it replaces
(tests/nca_reference.py), in turns.

    python tests/bench_nca.py [--pairs 7] [--threads 0]

Tokens: rows of PR 63's settings (12x12 grids, 36 steps, 26 recorded, 10 rows a rule), from rule ids
to tokens. Rules: candidates from id to compressed size. The loop runs with one thread or all,
whichever was faster in a trial here; ours with all (or --threads). They take turns of about half a
second, and the ratio is taken turn by turn. Prints each one's median and range, the ratio's, and
one line of JSON. "cpu ratio" compares seconds of processor time instead of seconds: it is what one
core does, and stays when other programs take cores away.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import nca_reference as reference  # noqa: E402

import pre_pre_train as nca  # noqa: E402

REFERENCE_RULES, REFERENCE_CANDIDATES, OUR_ROWS, OUR_CANDIDATES = 8, 100, 3072, 3072


def seconds(work) -> tuple[float, float]:
    """Seconds, and seconds of processor time of all threads."""
    began, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - busy


def quicker_threads(work) -> int:
    """One or all of torch's threads, whichever make the work quicker."""
    trials = {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        trials[threads] = min(seconds(work)[0] for _ in range(2))
    return min(trials, key=trials.get)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7, help="turns of each")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of the generator; 0: all cores"
    )
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    cfg = nca.make_config(
        nca_cache="", nca_filter="none", nca_tokens=OUR_ROWS * 988, nca_threads=args.threads
    )
    judged = nca.make_config(nca_cache="", nca_threads=args.threads)
    data = nca.NcaData(cfg, "train")

    def our_candidates() -> None:
        ids = np.arange(OUR_CANDIDATES)
        with nca.workers(judged) as pool:
            score = lambda some: nca.compressed_sizes(ids[some], judged)
            list(pool.map(score, nca.pieces(len(ids), judged)))

    jobs = {  # (name, unit): what the loop does and how much of it, what we do and how much
        ("tokens", "tokens/s"): (
            lambda: reference.generate_rows(range(REFERENCE_RULES)),
            REFERENCE_RULES * 10 * 988,
            lambda: data.generate(0, np.arange(OUR_ROWS)),
            OUR_ROWS * 988,
        ),
        ("rules", "candidate rules/s"): (
            lambda: [reference.score(i) for i in range(REFERENCE_CANDIDATES)],
            REFERENCE_CANDIDATES,
            our_candidates,
            OUR_CANDIDATES,
        ),
    }
    out = {"n": args.pairs}
    for (name, unit), (theirs, their_count, ours, our_count) in jobs.items():
        threads = torch.get_num_threads()
        torch.set_num_threads(quicker_threads(theirs))
        ours()
        rates = {"loop": [], "ours": [], "ratio": [], "cpu ratio": []}
        for _ in range(args.pairs):
            (wall, cpu), (our_wall, our_cpu) = seconds(theirs), seconds(ours)
            rates["loop"].append(their_count / wall)
            rates["ours"].append(our_count / our_wall)
            rates["ratio"].append(our_count / our_wall / (their_count / wall))
            rates["cpu ratio"].append(our_count / our_cpu / (their_count / cpu))
        for which, r in rates.items():
            digits, what = (1, "") if which.endswith("ratio") else (0, " " + unit)
            print(
                f"{name:7} {which:9} {statistics.median(r):12,.{digits}f}{what} (median of "
                f"{len(r)}; {min(r):,.{digits}f} to {max(r):,.{digits}f})",
                flush=True,
            )
            out[f"{name} {which}".replace(" ", "_")] = statistics.median(r)
        torch.set_num_threads(threads)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
