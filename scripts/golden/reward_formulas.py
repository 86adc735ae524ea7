"""Writes tests/reward/formulas.json: what the reward functions of TRL and open-r1 give.

    pip install math-verify==0.9.0 && pip install --no-deps trl==1.16.0
    python scripts/golden/reward_formulas.py

TRL's functions are those of the installed wheel. open-r1 (src/open_r1/rewards.py) is no package: its formulas are computed
here from their published definitions, each named in the docstring.
"""

import functools
import importlib.util
import json
import math
import re
import sys
import types
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "tests" / "reward" / "formulas.json"


@functools.cache
def trl_rewards(name):
    """A file of `trl.rewards` without the rest of TRL, which would want torch."""
    for loaded in [module for module in sys.modules if module.split(".")[0] == "trl"]:
        del sys.modules[loaded]
    root = Path(importlib.util.find_spec("trl").submodule_search_locations[0])
    package = types.ModuleType("trl")
    package.__path__ = [str(root)]
    utils = types.ModuleType("trl.import_utils")
    utils.is_math_verify_available = lambda: True
    rewards = types.ModuleType("trl.rewards")
    rewards.__path__ = [str(root / "rewards")]
    sys.modules.update({"trl": package, "trl.import_utils": utils, "trl.rewards": rewards})
    spec = importlib.util.spec_from_file_location(f"trl.rewards.{name}", root / "rewards" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def is_right(texts, golds):
    return [score == 1.0 for score in trl_rewards("accuracy_rewards").accuracy_reward(messages(texts), golds)]


def open_r1_cosine(texts, golds, low_wrong=0.0, high_wrong=-0.5, low_right=0.5, high_right=1.0, longest=1000):
    """`get_cosine_scaled_reward` with the defaults of open-r1's GRPOScriptArguments; arXiv 2502.03373, appendix C.1."""
    scores = []
    for text, right in zip(texts, is_right(texts, golds)):
        start, end = (high_right, low_right) if right else (low_wrong, high_wrong)
        scores.append(end + (start - end) * (1 + math.cos(math.pi * len(text) / longest)) / 2)
    return scores


def open_r1_length(texts, golds):
    """`len_reward`; Kimi k1.5, arXiv 2501.12599, section 2.3.3."""
    shortest, longest = min(map(len, texts)), max(map(len, texts))
    if shortest == longest:
        return [0.0] * len(texts)
    values = [0.5 - (len(text) - shortest) / (longest - shortest) for text in texts]
    return [value if right else min(0.0, value) for value, right in zip(values, is_right(texts, golds))]


def open_r1_repetition(texts, size=3, penalty=-1.0):
    """`get_repetition_penalty_reward`; arXiv 2502.03373, appendix C.2, over words in lower case."""
    scores = []
    for text in texts:
        words = text.lower().split()
        grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        scores.append((1 - len(set(grams)) / len(grams)) * penalty if grams else 0.0)
    return scores


def open_r1_steps(texts):
    """`reasoning_steps_reward`: signs of steps, three of which are worth 1."""
    signs = r"(Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,)"
    return [min(1.0, len(re.findall(signs, text)) / 3) for text in texts]


def open_r1_format(texts):
    """`format_reward`: the layout of reasoning and answer on lines of their own."""
    layout = r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$"
    return [float(bool(re.match(layout, text, re.DOTALL | re.MULTILINE))) for text in texts]


def open_r1_tags(texts):
    """`tag_count_reward`: a quarter for each tag that is there once."""
    tags = ["<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>"]
    return [sum(0.25 for tag in tags if text.count(tag) == 1) for text in texts]


def main():
    accuracy, layout, other = (trl_rewards(name) for name in ("accuracy_rewards", "format_rewards", "other_rewards"))
    answers = [r"\boxed{4}", r"So it is \boxed{5}.", "x" * 200 + r" \boxed{4}", "y" * 500 + r" \boxed{9}", "no answer"]
    golds = ["4", "5", "4", "4", "4"]
    tokens = [[i % 7 for i in range(n)] for n in (10, 50, 99, 100, 140)]
    texts = [
        "",
        "one",
        "a b c d",
        "5 5 5 5 5",
        "A b a B a b",
        "the cat sat on the mat the cat sat on the mat",
        "1. First, we add.\n- then\n* so\nFinally, done",
        "Step 1: a\nStep 2: b",
        "2. no\n3. not these",
        "First, Second, Next, Finally, Step 12: end",
    ]
    tagged = [
        "<think>\na\n</think>\n<answer>\nb\n</answer>",
        "<think>\na\n</think>\n<answer>\nb\n</answer>\nand more",
        "<think>\na\n</think>\n<answer>\nb\n</answer> more",
        "<think>\na\n</think>\n<answer>b</answer>",
        "<think>a</think>\n<answer>\nb\n</answer>",
        "x <think>\na\n</think>\n<answer>\nb\n</answer>",
        "<think>\na\n</think>\n<answer>\nb\n</answer>\n<answer>\nc\n</answer>",
        "<think>\n\n</think>\n<answer>\n\n</answer>",
        "<think>a</think>b",
        "<think>a<think>b</think>",
        "<think>a",
    ]
    runs = [
        # reward, parameters, completions, columns, tokens, scores
        ("accuracy_reward", {}, answers, golds, None, accuracy.accuracy_reward(messages(answers), golds)),
        (
            "reasoning_accuracy_reward",
            {},
            [f"<think>hm \\boxed{{4}}</think> {a}" for a in answers],
            golds,
            None,
            accuracy.reasoning_accuracy_reward(messages([f"<think>hm \\boxed{{4}}</think> {a}" for a in answers]), golds),
        ),
        ("think_format_reward", {}, tagged, None, None, layout.think_format_reward(messages(tagged))),
        ("format", {}, tagged, None, None, open_r1_format(tagged)),
        ("tag_count", {}, tagged, None, None, open_r1_tags(tagged)),
        ("reasoning_steps", {}, texts, None, None, open_r1_steps(texts)),
        ("length", {}, answers, golds, None, open_r1_length(answers, golds)),
        ("len_reward", {}, ["abc", "abd"], ["1", "2"], None, open_r1_length(["abc", "abd"], ["1", "2"])),
        ("cosine", {}, answers, golds, None, open_r1_cosine(answers, golds)),
    ]
    own = dict(
        cosine_min_value_wrong=-1.5,
        cosine_max_value_wrong=-0.25,
        cosine_min_value_correct=0.1,
        cosine_max_value_correct=2.0,
        cosine_max_len=300,
    )
    runs.append(("cosine", own, answers, golds, None, open_r1_cosine(answers, golds, -1.5, -0.25, 0.1, 2.0, 300)))
    for longest, changed in ((100, {}), (120, dict(min_value_wrong=-2.0, max_value_wrong=0.0, min_value_correct=0.25))):
        scaled = accuracy.get_cosine_scaled_reward(max_len=longest, **changed)
        scores = scaled(messages(answers), golds, tokens)
        runs.append(("get_cosine_scaled_reward", dict(max_len=longest, **changed), answers, golds, tokens, scores))
    for size, penalty in ((3, -1.0), (2, -0.5), (1, -2.0)):
        scores = open_r1_repetition(texts, size, penalty)
        runs.append(("repetition_penalty", dict(ngram_size=size, max_penalty=penalty), texts, None, None, scores))
        named = dict(repetition_n_grams=size, repetition_max_penalty=penalty)
        runs.append(("repetition_penalty", named, texts, None, None, scores))
        by_token = other.get_repetition_penalty_reward(size, penalty)(tokens)
        keys = dict(ngram_size=size, max_penalty=penalty)
        runs.append(("get_repetition_penalty_reward", keys, answers, None, tokens, by_token))
    for longest, cache in ((100, 20), (120, 0), (140, 140)):
        scores = other.get_soft_overlong_punishment(longest, cache)(tokens)
        keys = dict(max_completion_len=longest, soft_punish_cache=cache)
        for name in ("get_soft_overlong_punishment", "soft_overlong_punishment"):
            runs.append((name, keys, answers, None, tokens, scores))
    names = ("reward", "parameters", "completions", "solutions", "tokens", "scores")
    OUT.write_text(json.dumps([dict(zip(names, run)) for run in runs], indent=1) + "\n", encoding="utf-8")
    print(f"{len(runs)} runs in {OUT}")


if __name__ == "__main__":
    main()
