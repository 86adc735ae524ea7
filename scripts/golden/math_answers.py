"""Scores the answer pairs of tests/reward/math_answers.jsonl with math-verify, as TRL's `accuracy_reward` calls it.

    pip install math-verify==0.9.0
    python scripts/golden/math_answers.py            # checks the stored judgements
    python scripts/golden/math_answers.py --write    # stores new ones

Each line has `gold`, `completion`, `want` (what `accuracy` gives: 1, 0, or null where the gold cannot be read), `judge`
(what math-verify gives), `from` (where the pair comes from), and `why` wherever the two differ.
"""

import json
import sys
from pathlib import Path

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

PAIRS = Path(__file__).resolve().parents[2] / "tests" / "reward" / "math_answers.jsonl"


def judge(gold, completion):
    """The score of trl 1.16.0, trl/rewards/accuracy_rewards.py: None if the gold cannot be parsed."""
    gold_parsed = parse(gold, parsing_timeout=10)
    if not gold_parsed:
        return None
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    answer = parse(completion, extraction_config=[config], extraction_mode="first_match", parsing_timeout=10)
    return int(verify(gold_parsed, answer, timeout_seconds=5))


def best(gold, completion):
    """TRL takes one text; of several right answers, or a number, each is judged as text."""
    golds = gold if isinstance(gold, list) else [gold]
    scores = [judge(g if isinstance(g, str) else json.dumps(g), completion) for g in golds]
    known = [score for score in scores if score is not None]
    return max(known) if known else None


def main():
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    changed = 0
    for row in rows:
        score = best(row["gold"], row["completion"])
        if row.get("judge") != score or "judge" not in row:
            changed += 1
            print("judged", score, "stored", row.get("judge"), row["gold"], "|", row["completion"])
        row["judge"] = score
    differ = [row for row in rows if row["judge"] != row["want"]]
    unexplained = [row for row in differ if not row.get("why")]
    for row in unexplained:
        print("no reason: want", row["want"], "judge", row["judge"], row["gold"], "|", row["completion"])
    print(f"{len(rows)} pairs, {len(differ)} differ, {len(unexplained)} of them without a reason, {changed} judged anew")
    if "--write" in sys.argv[1:]:
        order = ["gold", "completion", "want", "judge", "from", "why"]
        lines = [json.dumps({k: row[k] for k in order if k in row}, ensure_ascii=False) for row in rows]
        PAIRS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif changed or unexplained:
        sys.exit(1)


if __name__ == "__main__":
    main()
