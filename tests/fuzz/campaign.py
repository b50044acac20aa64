"""Cases by number, as many as one likes: the same number is the same case on every machine.

    python tests/fuzz/campaign.py [NAME ...] [--first 0] [--cases 1000] [--seconds S]

A case makes its input from its number alone and raises if what it promises does not hold. Prints
the number of cases of each name and those that failed; exit code 1 if any did.
"""

import argparse
import sys
import time
import traceback

import choices
import files
import operators  # noqa: F401  its cases are in choices.CASES, as those of the next
import robustness  # noqa: F401

CASES = choices.CASES | files.CASES
"""Functions of a case number, by name."""


def run(name, first, count, seconds=float("inf")):
    """Runs cases until the time is over. Returns how many ran, and which numbers failed."""
    end, failed = time.monotonic() + seconds, []
    for number in range(first, first + count):
        if time.monotonic() > end:
            return number - first, failed
        try:
            CASES[name](number)
        except Exception:
            failed.append(number)
            print(f"{name}, case {number}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return count, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=1000, help="of each name")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="for each name, at most"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(CASES):
        parser.error(f"NAME must be one of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    bad = 0
    for name in options.names or CASES:
        ran, failed = run(name, options.first, options.cases, options.seconds)
        which = f": {failed[:20]}" if failed else ""
        print(f"{name}: {ran} cases, {len(failed)} failed{which}", flush=True)
        bad += len(failed)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
