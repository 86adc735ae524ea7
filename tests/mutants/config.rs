//! The configuration of a run.

use std::path::Path;

use trainer::config::{Context, Source, load_grpo, load_sft};
use trainer::reward;

use super::mutate::{Reader, Seeds, no_files};

pub(crate) const CONFIG: Reader = Reader { name: "config", prepare: no_files, seeds, read, cost: 1 };

/// Files of this repository and recipes of others; keys whose values are lists, tables and text in YAML's forms.
fn seeds(_: &Path) -> Seeds {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = [
        "configs/ci/sft.yaml",
        "configs/ci/grpo.yaml",
        "configs/qwen05b/grpo.yaml",
        "configs/grpo_config_deepseek.yaml",
        "tests/recipes/handbook-smollm3-sft.yaml",
        "tests/recipes/openr1-qwen-1.5b-grpo-code.yaml",
    ];
    let mut seeds: Vec<_> =
        files.iter().map(|file| ("a.yaml".to_string(), std::fs::read(repository.join(file)).unwrap())).collect();
    // For one process, whose batch is smaller.
    let recipe = String::from_utf8(seeds[5].1.clone()).unwrap();
    seeds[5].1 = recipe.replace("num_generations: 14", "num_generations: 16").into();
    let forms = "\
model_name_or_path: &m 'data/tiny-qwen'
tokenizer_name_or_path: *m
output_dir: \"o\\u00e4\"
dataset_mixture:
  datasets:
  - {id: a.jsonl, weight: 0.5, columns: [prompt, completion], split: 'train[:10%]'}
  - {id: b.jsonl, weight: 5e-1}
  test_split_size: 0.1
lora_target_modules: '.*\\.(q|v)_proj'
use_peft: true
chat_template: |
  {% for m in messages %}{{ m.content }}
  {% endfor %}
chat_template_kwargs: '{\"enable_thinking\": false}'
learning_rate: 1.0e-5
save_steps: 0.25
save_strategy: steps
lr_scheduler_kwargs: {min_lr_rate: 0.1}
lr_scheduler_type: cosine_with_min_lr
";
    let rewards = "\
model_name_or_path: m
output_dir: o
dataset_name: d.jsonl
reward_funcs:
- accuracy
- {kind: regex, pattern: '[0-9]{1,3}'}
- {kind: length_penalty, soft_punish_cache: 6}
- command: python3 scripts/rewards/brevity.py
  timeout_secs: 5
reward_weights: [1, .5, 0, 2]
generation_kwargs: {top_k: 3}
num_generations: 4
stop: [\"\\n\", x]
";
    seeds.extend([forms, rewards].map(|text| ("a.yaml".to_string(), text.into())));
    seeds
}

fn read(path: &Path, _: &Path) -> Result<(), String> {
    let source = Source::read(path).map_err(|e| e.render(true))?;
    let context = Context { check_reward: Some(reward::check), ..Context::default() };
    let sft = load_sft(&source, &[], &context);
    let grpo = load_grpo(&source, &[], &context);
    // What is written beside the results is read again, to the same settings.
    let again = |yaml: &str| Source::new("config.resolved.yaml", yaml);
    if let Ok(loaded) = &sft {
        let found = load_sft(&again(&loaded.resolved_yaml), &[], &context);
        let found = found.unwrap_or_else(|e| panic!("{}\n{}", e.render(false), loaded.resolved_yaml));
        assert_eq!(format!("{:?}", found.settings), format!("{:?}", loaded.settings));
    }
    if let Ok(loaded) = &grpo {
        let found = load_grpo(&again(&loaded.resolved_yaml), &[], &context);
        let found = found.unwrap_or_else(|e| panic!("{}\n{}", e.render(false), loaded.resolved_yaml));
        assert_eq!(format!("{:?}", found.settings), format!("{:?}", loaded.settings));
    }
    match (sft, grpo) {
        (Err(one), Err(other)) => Err(format!("{}{}", one.render(true), other.render(false))),
        _ => Ok(()),
    }
}
