"""Damaged and hostile files of every kind that is read, by the thousand: what becomes of them.

    python benchmarks/fuzz.py --count 10000 --json fuzz.json      all kinds, an equal share each
    python benchmarks/fuzz.py --count 500 --kind manifest         one

Each input is a good file with a few changes made by hypothesis. Right is: taken, and what it says is true; or
refused in one line that names the file. Every other error, any code of the file that ran, and anything written
outside of its folder is a fault; the script then fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.fuzzing import KINDS, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all")
    parser.add_argument(
        "--kind", action="append", choices=sorted(KINDS), help="only this kind; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts by kind")
    args = parser.parse_args()
    names = args.kind or list(KINDS)
    shares = [args.count // len(names) + (i < args.count % len(names)) for i in range(len(names))]
    results, begin = {}, time.monotonic()
    print(f"{'kind':<20}{'tried':>8}{'taken':>8}{'refused':>8}{'faults':>8}")
    for name, share in zip(names, shares, strict=True):
        if not share:
            continue
        with tempfile.TemporaryDirectory() as folder:
            tally = fuzz(name, share, Path(folder), at=args.seed)
        results[name] = asdict(tally) | {
            "faults": len(tally.faults),
            "examples": sorted(set(tally.faults))[:20],
        }
        print(
            f"{name:<20}{tally.tried:>8}{tally.accepted:>8}{tally.refused:>8}{len(tally.faults):>8}",
            flush=True,
        )
        for fault in sorted(set(tally.faults))[:5]:
            print(f"    {fault[:300]}")
    tried, faults = (sum(r[key] for r in results.values()) for key in ("tried", "faults"))
    print(f"{'all':<20}{tried:>8}{'':>16}{faults:>8}   in {time.monotonic() - begin:.0f} s")
    if args.json is not None:
        args.json.write_text(
            json.dumps({"tried": tried, "faults": faults, "kinds": results}, indent=1) + "\n"
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
