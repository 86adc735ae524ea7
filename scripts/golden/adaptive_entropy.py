"""Makes tests/golden/adaptive_entropy: the entropy bonus whose weight follows the entropy, by TRL's own `_compute_loss`.

usage: python scripts/golden/adaptive_entropy.py [FOLDER]   (trl 1.16, torch)
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer

CASES = {
    "up_and_down": dict(entropy_coef=0.01, entropy_coef_min=0.0, entropy_coef_max=0.02, entropy_coef_delta=0.006,
                        entropy_target=0.6, top_entropy_quantile=1.0),
    "high_entropy_tokens": dict(entropy_coef=0.0, entropy_coef_min=0.001, entropy_coef_max=1.0, entropy_coef_delta=0.005,
                                entropy_target=0.8, top_entropy_quantile=0.4),
    "only_the_highest": dict(entropy_coef=0.1, entropy_coef_min=0.0, entropy_coef_max=1.0, entropy_coef_delta=0.05,
                             entropy_target=1.1, top_entropy_quantile=0.0),
}
ACCUMULATION, STEPS, ROWS, TOKENS = 2, 6, 3, 5


class Accelerator:
    num_processes, sync_gradients = 1, False

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x

    def pad_across_processes(self, x, dim, pad_index):
        return x


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "tests/golden/adaptive_entropy")
    root.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    cases = []
    for name, options in CASES.items():
        trainer = object.__new__(GRPOTrainer)
        keep = {k: v for k, v in options.items() if k not in ("entropy_coef", "top_entropy_quantile")}
        attributes = dict(
            args=SimpleNamespace(**keep, delta=None, steps_per_generation=ACCUMULATION), accelerator=Accelerator(),
            entropy_coef=options["entropy_coef"], top_entropy_quantile=options["top_entropy_quantile"],
            use_adaptive_entropy=True, _entropy_bonus_enabled=True, _last_world_entropy=float("inf"),
            _entropy_window_stats=None, beta=0.0, loss_type="dapo", importance_sampling_level="token", epsilon_low=0.2,
            epsilon_high=0.2, use_vllm=False, vllm_importance_sampling_correction=False, off_policy_mask_threshold=None,
            aux_loss_enabled=False, max_completion_length=TOKENS, current_gradient_accumulation_steps=ACCUMULATION,
            model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)}, num_iterations=1,
        )
        trainer.__dict__.update(attributes)
        steps = []
        for step in range(STEPS):
            micro_steps = []
            for micro in range(ACCUMULATION):
                trainer.accelerator.sync_gradients = micro == ACCUMULATION - 1
                mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
                for row in range(ROWS):
                    mask[row, int(torch.randint(2, TOKENS + 1, ())):] = 0
                logprobs = (-torch.rand(ROWS, TOKENS) * 2).requires_grad_()
                entropies = (torch.rand(ROWS, TOKENS) * (0.4 + 0.35 * (step % 4))).requires_grad_()
                old = logprobs.detach() + 0.1 * torch.randn(ROWS, TOKENS)
                advantages = torch.randn(ROWS)
                trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logprobs, entropies, None)
                inputs = dict(
                    prompt_ids=torch.zeros(ROWS, 1, dtype=torch.long), prompt_mask=torch.ones(ROWS, 1, dtype=torch.long),
                    completion_ids=torch.zeros(ROWS, TOKENS, dtype=torch.long), completion_mask=mask, advantages=advantages,
                    old_per_token_logps=old, num_items_in_batch=torch.tensor(float(ACCUMULATION * mask.sum())),
                )
                loss = trainer._compute_loss(trainer.model, inputs)
                loss.backward()
                rows = lambda x: [x[r][mask[r] == 1].tolist() for r in range(ROWS)]
                micro_steps.append(dict(
                    logprobs=rows(logprobs.detach()), old_logprobs=rows(old), entropies=rows(entropies.detach()),
                    advantages=advantages.tolist(), num_items_in_batch=int(ACCUMULATION * mask.sum()), loss=loss.item(),
                    d_entropies=rows(entropies.grad),
                ))
            steps.append(dict(
                micro_steps=micro_steps, entropy_coef=trainer.entropy_coef, world_entropy=trainer._last_world_entropy,
                logged_coef=trainer._metrics["train"]["entropy_coef"][-1],
            ))
        cases.append(dict(name=name, **options, gradient_accumulation_steps=ACCUMULATION, steps=steps))
    (root / "cases.json").write_text(json.dumps({"trl": trl.__version__, "torch": torch.__version__, "cases": cases}) + "\n")
    (root / "README.md").write_text(
        "# adaptive_entropy: the weight of the entropy bonus follows the entropy\n\n"
        "Made by scripts/golden/adaptive_entropy.py with TRL's `GRPOTrainer._compute_loss`: per micro-step the inputs (rows without\n"
        "their masked tokens), the loss and its gradient by the entropies; per step the weight it leaves. Advised: 1e-5.\n"
    )


main()
