"""`python -m bench.itself`: tests bench's own statistics on processes with known truth.

Five tables: how often 95% intervals hold the truth (or are withheld); measured over true throughput
of closed loops, and in which share of them bench finds a steady state; how often equal servers are
said to differ, and slower ones found; how often `tune` keeps the defaults where nothing is better;
and whether `search` finds the limit of a server of 16 requests/s within ten minutes.
"""

import argparse
import sys

from bench.itself import batching, coverage, power


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.itself", description=__doc__)
    parser.add_argument("--trials", type=int, default=400, help="series of each process")
    parser.add_argument("--loops", type=int, default=20, help="closed loops of each kind")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of servers")
    parser.add_argument("--tunings", type=int, default=100)
    parser.add_argument("--searches", type=int, default=20)
    options = parser.parse_args()
    print("Coverage of 95% intervals, and the share of series that have one\n")
    print(coverage.table(coverage.all_processes(options.trials)), flush=True)
    print("\nMeasured over true tokens/s of closed loops, and the share with a steady state\n")
    print(batching.table(batching.all_loops(options.loops)), flush=True)
    print("\nTwo servers compared, three repeats each\n")
    print(power.comparisons(options.pairs), flush=True)
    print("\nTuning\n")
    print(power.tunings(options.tunings), flush=True)
    print("\nSearch of a server that keeps its objective up to 16 requests/s, 600 s each\n")
    print(power.searches(options.searches), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
