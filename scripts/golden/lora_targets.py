"""Makes tests/golden/lora_targets: adapters on chosen modules and weights trained whole, with PEFT and transformers.

usage: python scripts/golden/lora_targets.py [FOLDER]   (peft 0.21, transformers 5.24, torch, safetensors)
"""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

warnings.filterwarnings("ignore")
SMOOTHING = 0.2
SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)
BASES = {
    "base_tied": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "base_untied": (Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=False, head_dim=8)),
}
VARIANTS = {
    "head_of_tied": ("base_tied", dict(target_modules=["q_proj", "lm_head"])),
    "head_of_untied": ("base_untied", dict(target_modules=["v_proj", "lm_head"], use_rslora=True)),
    "embedding": ("base_untied", dict(target_modules=["embed_tokens", "q_proj"])),
    "both_ends_of_tied": (
        "base_tied",
        dict(
            target_modules=["embed_tokens", "lm_head", "down_proj"],
            rank_pattern={"lm_head": 2, "^down_proj": 7},
            alpha_pattern={"layers.1.mlp.down_proj": 3, "embed_tokens": 16},
        ),
    ),
    "pattern_and_norms": (
        "base_tied",
        dict(
            target_modules=r"model\.layers\.1\.self_attn\.(?P<which>q|v)_proj",
            modules_to_save=["model.norm", "input_layernorm"],
        ),
    ),
    "one_layer": (
        "base_untied",
        dict(
            target_modules=["q_proj", "up_proj", "model.layers.0.mlp.down_proj"],
            layers_to_transform=[1],
            exclude_modules=r".*\.q_proj",
        ),
    ),
    "saved_mlp": ("base_untied", dict(target_modules="all-linear", modules_to_save=["mlp"])),
    "saved_head_of_tied": ("base_tied", dict(target_modules=["o_proj"], modules_to_save=["lm_head"])),
    "saved_embedding_of_tied": ("base_tied", dict(target_modules=["o_proj"], modules_to_save=["embed_tokens"])),
    "saved_ends_of_tied": ("base_tied", dict(target_modules=["o_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "saved_ends_of_untied": ("base_untied", dict(target_modules=["k_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "decomposed": ("base_untied", dict(target_modules=["q_proj", "gate_proj"], use_dora=True)),
}


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, SIZES["vocab_size"], (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate([11, 8, 5]):
        mask[row, length:] = 0
        ids[row, length:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return ids, mask, labels


def name_in_file(name):
    name = name.replace(".modules_to_save.default.", ".").replace(".default", "")
    return re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", name)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name_in_file(n): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in found.values())
    return found


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "tests/golden/lora_targets")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    torch.manual_seed(0)
    for name, (kind, config) in BASES.items():
        config.initializer_range = 0.1
        model = kind(config).float()
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                torch.nn.init.uniform_(parameter, 0.7, 1.3)
        model.save_pretrained(root / name)
        (root / name / "generation_config.json").unlink(missing_ok=True)
    meta = {"versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)}, "variants": {}}
    for seed, (name, (base, options)) in enumerate(VARIANTS.items()):
        ids, mask, labels = inputs(seed)
        batch = dict(input_ids=ids, attention_mask=mask)
        kind = BASES[base][0]
        with torch.no_grad():
            logits_off = kind.from_pretrained(root / base, dtype=torch.float32)(**batch).logits
        model = kind.from_pretrained(root / base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.02 if "modules_to_save" in parameter_name or "magnitude" in parameter_name else 0.2
                parameter.data += scale * torch.randn_like(parameter)
        model.eval()
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(root / name)
        (root / name / "README.md").unlink(missing_ok=True)
        output = model(**batch, labels=labels)
        smoothed = LabelSmoother(epsilon=SMOOTHING)({"logits": model(**batch).logits}, labels, shift_labels=True)
        tensors = {
            "input_ids": ids, "attention_mask": mask, "labels": labels, "logits_on": output.logits.detach(),
            "logits_off": logits_off, "loss_on": output.loss.detach().reshape(1), "loss_smoothed": smoothed.detach().reshape(1),
            "smoothing": torch.tensor([SMOOTHING]),
        }
        tensors |= {f"grad_smoothed.{n}": g for n, g in gradients(model, smoothed).items()}
        tensors |= {f"grad.{n}": g for n, g in gradients(model, output.loss).items()}
        save_file({n: t.contiguous() for n, t in tensors.items()}, root / name / "io.safetensors")
        meta["variants"][name] = {"base": base}
    (root / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    (root / "README.md").write_text(
        "# lora_targets: adapters on chosen modules, weights trained whole\n\n"
        "Made by scripts/golden/lora_targets.py. The form is that of the group `lora`, without merged weights; `loss_smoothed` and\n"
        "`grad_smoothed.*` are those of transformers' LabelSmoother with the factor `smoothing`.\n"
    )


main()
