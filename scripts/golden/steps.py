"""Writes tests/golden/steps/steps.json: how transformers' Trainer and TRL's GRPOTrainer count.

usage: python scripts/golden/steps.py [FOLDER]

Made with transformers 5.24.0, trl 1.16.0, accelerate 1.15.0, torch 2.15.0 on a CPU. Each case is a real run of a tiny random
model, watched from outside: the rows of every micro-batch, the learning rate and `epoch` of every step, and the steps after
which it logged, evaluated and saved. The lengths for several ranks are those of accelerate's BatchSamplerShard.
"""
import itertools
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import BatchSampler
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

WORDS = ["<pad>", "<eos>", "a", "b", "c", "d", "e", "f"]


def model():
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, pad_token_id=0, eos_token_id=1,
        )
    )


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


class Watch(TrainerCallback):
    """Notes what happens after which step."""

    def __init__(self):
        self.found = {"epoch": [], "lr": [], "micro_batches": [], "logged": [], "evaluated": [], "saved": []}
        self.current = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.lr = kwargs["lr_scheduler"].get_last_lr()[0]

    def on_step_end(self, args, state, control, **kwargs):
        self.found["epoch"].append(state.epoch)
        self.found["lr"].append(self.lr)
        self.found["micro_batches"].append(self.current)
        self.current = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.found["logged"].append(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.found["evaluated"].append(state.global_step)


def watched(base):
    """A trainer that tells its watch of each micro-batch and of saves, and writes nothing."""

    class Watched(base):
        def training_step(self, model, inputs, *args):
            # GRPO makes the micro-batch of a generation batch inside.
            rows = len(inputs["input_ids"]) if isinstance(inputs, dict) else self.args.per_device_train_batch_size
            self.watch.current.append(rows)
            return super().training_step(model, inputs, *args)

        def _save_checkpoint(self, model, trial):
            self.watch.found["saved"].append(self.state.global_step)

    return Watched


def arguments(case, folder):
    return {
        "output_dir": folder,
        "per_device_train_batch_size": case["batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "num_train_epochs": case["epochs"],
        "max_steps": case["max_steps"] or -1,
        "warmup_steps": case["warmup"],
        "logging_strategy": case["logging"][0],
        "logging_steps": case["logging"][1] or 1,
        "logging_first_step": case["logging_first_step"],
        "eval_strategy": case["evaluation"][0],
        "eval_steps": case["evaluation"][1],
        "eval_delay": case["eval_delay"],
        "eval_on_start": case["eval_on_start"],
        "save_strategy": case["saving"][0],
        "save_steps": case["saving"][1] or 1,
        "learning_rate": 1.0,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_nan_inf_filter": False,
    }


def run(trainer, case):
    trainer.watch = Watch()
    trainer.add_callback(trainer.watch)
    trainer.remove_callback(transformers.PrinterCallback)
    _, per_epoch, _, _, _, micro_steps, total = trainer.set_initial_training_values(
        trainer.args, trainer.get_train_dataloader()
    )
    trainer.train()
    counts = {"micro_steps_per_epoch": micro_steps, "steps_per_epoch": per_epoch, "total": total}
    return case | counts | trainer.watch.found


def sft(case):
    rows = [{"input_ids": [2, 3, 4], "labels": [2, 3, 4]}] * case["rows"]
    collate = lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(**arguments(case, folder), dataloader_drop_last=case["drop_last"])
        trainer = watched(Trainer)(model(), args, collate, train_dataset=rows, eval_dataset=rows[:1])
        return run(trainer, case)


def grpo(case):
    rows = [{"prompt": f"{a} {b}"} for a, b in itertools.product(WORDS[2:], WORDS[2:])][: case["rows"]]
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            **arguments(case, folder),
            num_generations=case["num_generations"],
            steps_per_generation=case["steps_per_generation"],
            num_iterations=case["num_iterations"],
            max_completion_length=2,
            per_device_eval_batch_size=case["num_generations"],
        )
        case = case | {"generation_batch_size": args.generation_batch_size}
        trainer = watched(GRPOTrainer)(
            model(), lambda completions, **kwargs: [float(len(c)) for c in completions], args,
            train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:1]), processing_class=tokenizer(),
        )
        asked = []
        inner = trainer._generate_and_score_completions

        def generate(inputs):
            if trainer.model.training:
                asked.append(len({row["prompt"] for row in inputs}))
            return inner(inputs)

        trainer._generate_and_score_completions = generate
        return run(trainer, case) | {"prompts_of_generations": asked}


def lengths():
    """len(dataloader) for several ranks, with the rows of each rank's micro-batches where they are not filled up."""
    found = []
    for rows, batch, world_size, drop_last in itertools.product([1, 3, 5, 8, 13, 24], [1, 2, 4], [1, 2, 3], [False, True]):
        sampler = BatchSampler(range(rows), batch, drop_last)
        shards = [BatchSamplerShard(sampler, world_size, rank) for rank in range(world_size)]
        assert len({len(shard) for shard in shards}) == 1
        found.append(
            {"rows": rows, "batch": batch, "world_size": world_size, "drop_last": drop_last, "micro_steps": len(shards[0])}
        )
    return found


def repeats():
    """What an epoch of GRPO asks for: rows of the sampler, by TRL's own class."""
    found = []
    for prompts, per_batch, generations, repeat in itertools.product([1, 3, 7, 12], [1, 2, 4], [2, 3], [1, 2, 6]):
        sampler = RepeatSampler(range(prompts), generations, per_batch, repeat, shuffle=False)
        rows = list(sampler)
        assert len(rows) == len(sampler)
        found.append(
            {"prompts": prompts, "prompts_per_batch": per_batch, "num_generations": generations, "repeats": repeat,
             "rows": len(rows), "distinct": len(set(rows))}
        )
    return found


def cadence(rng):
    strategy = lambda: rng.choice([["steps", 1], ["steps", 2], ["steps", 3], ["epoch", None], ["no", None]])
    return {
        "warmup": rng.choice([0, 2, 0.1, 0.34]),
        "logging": strategy(),
        "logging_first_step": rng.random() < 0.3,
        "evaluation": strategy(),
        "eval_delay": rng.choice([0, 0, 1, 2, 1.5]),
        "eval_on_start": rng.random() < 0.3,
        "saving": strategy(),
    }


def main():
    transformers.utils.logging.set_verbosity_error()
    rng = random.Random(5)
    cases = []
    grid = itertools.product([1, 3, 5, 8, 13], [1, 2, 4, 16], [1, 2, 3], [False, True])
    for rows, batch, accumulation, drop_last in grid:
        if drop_last and rows < batch:
            continue  # no batch at all: transformers stops with an error, or after no step
        lengths_of_run = [(1.0, None), (2.0, None), (0.5, None), (1.3, None), (2.6, None), (3.0, 1), (1.0, 7)]
        for epochs, max_steps in rng.sample(lengths_of_run, 3):
            case = {"task": "sft", "rows": rows, "batch": batch, "accumulation": accumulation, "epochs": epochs,
                    "max_steps": max_steps, "drop_last": drop_last}
            cases.append(sft(case | cadence(rng)))
    grid = itertools.product([4, 5, 7, 12], [2, 4], [1, 2, 3], [1, 2, 3], [1, 2])
    for rows, batch, accumulation, steps_per_generation, num_iterations in grid:
        prompts = batch * steps_per_generation // 2
        if rows < prompts or rng.random() < 0.5:
            continue  # fewer prompts than a generation batch: TRL stops with an error, or after no step
        epochs, max_steps = rng.choice([(1.0, None), (2.0, None), (0.5, None), (1.5, None), (1.0, 5)])
        case = {"task": "grpo", "rows": rows, "batch": batch, "accumulation": accumulation, "epochs": epochs,
                "max_steps": max_steps, "num_generations": 2, "steps_per_generation": steps_per_generation,
                "num_iterations": num_iterations}
        cases.append(grpo(case | cadence(rng)))
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/steps")
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(case) for case in cases)
    parts = [f'"runs": [\n{lines}\n]', f'"lengths": {json.dumps(lengths())}', f'"repeats": {json.dumps(repeats())}']
    (folder / "steps.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(len(cases), "cases")


main()
