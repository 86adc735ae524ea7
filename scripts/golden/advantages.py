"""Writes tests/golden/grpo/sparse_advantages.json: TRL's advantages where functions score few completions or none.

usage: python scripts/golden/advantages.py [FOLDER]

Made with trl 1.16.0, transformers 5.24.0, torch 2.15.0 on a CPU: GRPOTrainer._generate_and_score_completions of a tiny random
model, in which _calculate_rewards returns the rewards of the case (null: the function returned None).
"""
import itertools
import json
import math
import random
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

WORDS = ["<pad>", "<eos>", "a", "b", "c", "d"]


def trainer(case, folder):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1,
    )
    count = len(case["rewards"])
    functions = [lambda completions, **kwargs: [0.0] * len(completions) for _ in case["weights"]]
    for index, function in enumerate(functions):
        function.__name__ = f"f{index}"
    args = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=count, num_generations=case["num_generations"],
        multi_objective_aggregation=case["aggregation"], scale_rewards=case["scale"], reward_weights=case["weights"],
        max_completion_length=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": "a b"}] * (count // case["num_generations"]))
    return GRPOTrainer(Qwen2ForCausalLM(config), functions, args, train_dataset=rows, processing_class=tokenizer)


def run(case):
    with tempfile.TemporaryDirectory() as folder:
        grpo = trainer(case, folder)
        nan = float("nan")
        rewards = torch.tensor([[nan if r is None else r for r in row] for row in case["rewards"]])
        grpo._calculate_rewards = lambda *args: rewards.clone()
        output = grpo._generate_and_score_completions([{"prompt": "a b"}] * len(rewards))
        metrics = {name: values[-1] for name, values in grpo._metrics["train"].items() if "reward" in name}
    known = lambda value: None if math.isnan(value) else value
    return case | {
        "advantages": output["advantages"].tolist(),
        "metrics": {name: known(value) for name, value in metrics.items()},
    }


def column(rng, habit, count, group):
    """One function's rewards of a batch."""
    value = lambda: rng.choice([0.0, 1.0, 0.25, -2.0, 3.5])
    lone = [rng.randrange(group) for _ in range(count // group)]
    return {
        "all": lambda i: value(),
        "one of each group": lambda i: value() if i % group == lone[i // group] else None,
        "one of one group": lambda i: value() if i == lone[0] else None,
        "none": lambda i: None,
        "none of one group": lambda i: None if i < group else value(),
        "some": lambda i: value() if rng.random() < 0.5 else None,
        "same": lambda i: 0.5,
    }[habit]


def main():
    rng = random.Random(3)
    habits = ["all", "one of each group", "one of one group", "none", "none of one group", "some", "same"]
    sets = [[a] for a in habits] + [list(pair) for pair in itertools.product(habits, habits)]
    sets += [[rng.choice(habits) for _ in range(3)] for _ in range(12)]
    cases = []
    for functions in sets:
        group = rng.choice([2, 3, 4])
        count = group * rng.choice([1, 2, 3])
        columns = [[column(rng, habit, count, group)(i) for i in range(count)] for habit in functions]
        rewards = [list(row) for row in zip(*columns)]
        weights = [rng.choice([1.0, 0.5, 2.0]) for _ in functions]
        for aggregation, scale in [("normalize_then_sum", "group"), ("sum_then_normalize", rng.choice(["group", "batch", "none"]))]:
            case = {"functions": functions, "num_generations": group, "weights": weights, "aggregation": aggregation,
                    "scale": scale, "rewards": rewards}
            cases.append(run(case))
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/grpo")
    lines = ",\n".join(json.dumps(case) for case in cases)
    (folder / "sparse_advantages.json").write_text(f"[\n{lines}\n]\n")
    print(len(cases), "cases")


main()
