#!/usr/bin/env python3
"""A reward program: short completions score higher.

Reads one JSON object per line (a batch), writes one JSON object per line (its scores), until standard input ends.
The protocol is described in src/reward/command.rs. In a config file:

    reward_funcs:
      - {command: [python3, scripts/rewards/brevity.py, "200"], timeout_secs: 10}

Its name in the metrics is `brevity`, after the file; `name:` gives it another one.

Scores 1 for an empty completion, falling linearly to 0 at LIMIT characters (the argument, 200 by default), and null
("does not apply") for a row whose column `brevity` is false.
"""

import json
import sys


def score(sample, limit):
    if sample["row"].get("brevity") is False:
        return None
    return max(0.0, 1.0 - len(sample["completion"]) / limit)


def main():
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else 200.0
    for line in sys.stdin:
        request = json.loads(line)
        scores = [score(sample, limit) for sample in request["samples"]]
        print(json.dumps({"id": request["id"], "scores": scores}), flush=True)


if __name__ == "__main__":
    main()
