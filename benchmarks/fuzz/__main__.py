"""A campaign: python -m benchmarks.fuzz --calls 1000000 --seed 0.

It ends with a table of what was called and exits with status 1 if there was a finding. Each finding
is printed with the seed of its call: --seed SEED --calls 1, on the same libraries, repeats it.
"""

from __future__ import annotations

import argparse
import collections
import csv
import random
import sys
import time
from pathlib import Path

from benchmarks import record
from benchmarks.fuzz import calls, libraries
from benchmarks.fuzz.checks import Finding, check_refusal, check_result

RESULT = Path(__file__).parents[1] / "results" / "fuzz.csv"
COLUMNS = ("what", "calls", "refused", "values compared", "findings")
WRONG_SHARE = 0.25


class Campaign:
    """Counts of calls, refusals, compared values and findings, by library or head."""

    def __init__(self, *, verbose: bool) -> None:
        self.verbose = verbose
        self.counts: dict[str, collections.Counter[str]] = {}

    def core(self, seed: int) -> None:
        """One call of the core."""
        rng = random.Random(seed)
        call = calls.draw(rng)
        count = self.counts.setdefault(call.library.name, collections.Counter())
        count["calls"] += 1
        try:
            if rng.random() < WRONG_SHARE:
                check_refusal(rng, call)
                count["refused"] += 1
            else:
                count["values compared"] += check_result(call)
        except Finding as finding:
            self._found(count, seed, f"{call.function} on {call.library.name}: {finding}", call)

    def head(self, seed: int) -> None:
        """One case of a fused head."""
        from benchmarks.fuzz import heads

        case = heads.draw(random.Random(seed))
        count = self.counts.setdefault(case.title, collections.Counter())
        count["calls"] += 1
        try:
            count["values compared"] += heads.check(case)
        except Finding as finding:
            self._found(count, seed, f"{case.title}: {finding}", case)

    def _found(self, count: collections.Counter[str], seed: int, what: str, call: object) -> None:
        count["findings"] += 1
        print(f"seed {seed}: {what}", *([call] if self.verbose else []), sep="\n    ", flush=True)

    @property
    def findings(self) -> int:
        """Over all libraries and heads."""
        return sum(count["findings"] for count in self.counts.values())

    def rows(self) -> list[list[object]]:
        """The table, with a last row of sums."""
        rows = [[what, *(n[c] for c in COLUMNS[1:])] for what, n in sorted(self.counts.items())]
        total = [sum(n[c] for n in self.counts.values()) for c in COLUMNS[1:]]
        return [*rows, ["all", *total]]


def main() -> int:
    """Run a campaign and print or save its table."""
    parser = argparse.ArgumentParser(prog="benchmarks.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000, help="of the core")
    parser.add_argument("--heads", type=int, default=0, help="cases of the fused heads")
    parser.add_argument("--libraries", default=",".join(libraries.LOADERS))
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next is one up")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--verbose", action="store_true", help="print the arguments of a finding")
    options = parser.parse_args()
    libraries.load(options.libraries.split(","))
    campaign, start = Campaign(verbose=options.verbose), time.process_time()
    for seed in range(options.seed, options.seed + options.heads):
        campaign.head(seed)
    for seed in range(options.seed, options.seed + options.calls):
        campaign.core(seed)
        if (seed + 1) % 20_000 == 0:
            print(f"{seed + 1} calls, {time.process_time() - start:.0f} s of CPU", flush=True)
            if options.save:
                save(campaign, options.seed)
    print(*(" | ".join(map(str, row)) for row in campaign.rows()), sep="\n")
    if options.save:
        save(campaign, options.seed)
    return 1 if campaign.findings else 0


def save(campaign: Campaign, seed: int) -> None:
    """The table so far, with machine and versions."""
    versions = (*libraries.LIBRARIES, "spoloss")
    with RESULT.open("w", newline="") as file:
        print(f"# {record.machine(*versions)}, first seed {seed}", file=file)
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *campaign.rows()])


if __name__ == "__main__":
    sys.exit(main())
