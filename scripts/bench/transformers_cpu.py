"""The same work in transformers and PEFT on this CPU, for the table in the README: SFT steps with LoRA and greedy decoding.

Usage: transformers_cpu.py MODEL.gguf DATA.jsonl [float32|bfloat16]
Needs torch, transformers, peft, gguf. Prints one JSON object.
"""

import json
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

path, data, dtype = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "float32"
folder, name = path.rsplit("/", 1)
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=getattr(torch, dtype))
result = {"dtype": dtype, "threads": torch.get_num_threads()}

prompt = "Write a Python function that reverses a string."
text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
model.eval()
for batch in (1, 8):
    inputs = tokenizer([text] * batch, return_tensors="pt")
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        times = []
        for new_tokens in (4, 36):
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
            times.append(time.perf_counter() - start)
    # The difference leaves prefill out.
    result[f"decode_tokens_per_second_batch_{batch}"] = 32 * batch / (times[1] - times[0])

modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=modules, task_type="CAUSAL_LM"))
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
rows = [json.loads(line) for line in open(data)][:32]
texts = [tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) for r in rows]
tokenizer.padding_side = "right"
tokens = seconds = 0.0
for step in range(4):
    inputs = tokenizer(texts[8 * step : 8 * step + 8], return_tensors="pt", padding=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    start = time.perf_counter()
    model(**inputs, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step > 0:  # the first one warms up
        seconds += time.perf_counter() - start
        tokens += inputs["attention_mask"].sum().item()
result["sft_tokens_per_second"] = tokens / seconds
result["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps(result))
