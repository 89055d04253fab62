"""`python -m tests.reliability`: every topic with its large count; `--kills 200 --files 1000` tries those alone."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.reliability.attack import TOPICS, attack, topic


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.reliability", description="Attacks: tried, held, lost.")
    parser.add_argument("--seed", type=int, default=0, help="of all cases: the same seed makes the same cases")
    for name in TOPICS:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"cases of {name}; without any option: all topics")
    options = vars(parser.parse_args())
    asked = {name: options[name] for name in TOPICS if options[name] is not None}
    counts = asked or {name: topic(name).LARGE for name in TOPICS}
    outcomes = []
    for name, count in counts.items():
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(attack(name, count, options["seed"], Path(folder)))
        print(outcomes[-1], flush=True)
        for case in outcomes[-1].lost:
            print(f"    {case.what}: {case.wrong}", flush=True)
    return int(any(outcome.lost for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
