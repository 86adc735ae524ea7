use std::path::Path;

use serde_json::Value;

use super::*;
use crate::config::settings::{OffloadSettings, QuantType, RankBackend};
use crate::model::source::WeightSource;
use crate::train::bench::{Work as BenchWork, lora};

fn shape(model: &str, r: usize) -> Shape {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(model);
    let (config, _) = WeightSource::open(&path, Some(1)).unwrap();
    let packed = Quantization { quant_type: QuantType::Nf4, double_quant: true };
    Shape::of(config, Some(&lora(r)), Some(packed), 2, Types::BF16).unwrap()
}

/// A record of `trainer bench` on a GPU: what was asked for, and the peak of tensors.
fn work_of(record: &Value) -> (Work, Activations, RankSettings) {
    let text = |key: &str| record[key].as_str().unwrap();
    let number = |key: &str| record[key].as_u64().unwrap_or(0) as usize;
    let micro_batches = number("micro_batches");
    let work = match text("work").parse::<BenchWork>().unwrap() {
        BenchWork::Sequences { count, tokens } => Work {
            tokens: count * tokens,
            pairs: count * tokens * (tokens + 1) / 2,
            targets: count * (tokens - 1),
            is_known: true,
            micro_batches,
            rollouts: Rollouts::default(),
            has_reference: false,
        },
        BenchWork::Groups { prompts, samples, prompt_tokens, completion_tokens } => Work {
            tokens: prompts * (prompt_tokens + samples * (completion_tokens - 1)),
            pairs: prompts * prompt_tokens * (prompt_tokens + 1) / 2
                + prompts * samples * (completion_tokens - 1) * (prompt_tokens + completion_tokens / 2),
            targets: prompts * samples * completion_tokens,
            is_known: false,
            micro_batches,
            rollouts: Rollouts::default(),
            has_reference: false,
        },
    };
    let activations = match text("activations") {
        "keep" => Activations::Keep,
        "offload" => Activations::Offload,
        _ => Activations::Recompute,
    };
    let place = |key: &str| if record[key] == true { OffloadDevice::Cpu } else { OffloadDevice::None };
    let offload = OffloadSettings {
        optimizer: place("offload_optimizer"),
        params: place("offload_params"),
        ..OffloadSettings::default()
    };
    let stage = ZeroStage::of_number(number("zero_stage")).unwrap();
    let ranks = RankSettings { world_size: number("ranks").max(1), stage, offload, ..RankSettings::default() };
    (work, activations, ranks)
}

#[test]
fn estimates_are_within_a_twentieth_of_measured_peaks() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/baselines/nvidia-h200.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let mut measured = 0;
    let mut wrong = Vec::new();
    for record in text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        // Older records do not say all; an order that was forced is not what a run takes.
        if record["micro_batches"].is_null() || (record["ranks"].is_null() && record["micro_batches"] != 1) {
            continue;
        }
        if record["order"] == "breadth first" {
            continue;
        }
        // Measured before ranks that gather blocks went through several micro-batches at a time.
        let gathers =
            record["ranks"].as_u64() > Some(1) && (record["zero_stage"] == 3 || record["offload_params"] == true);
        if gathers && record["micro_batches"] != 1 && record["order"] == "depth first" {
            continue;
        }
        measured += 1;
        let (work, activations, ranks) = work_of(&record);
        let shape = shape(record["model"].as_str().unwrap(), record["lora_r"].as_u64().unwrap() as usize);
        let estimate = shape.estimate(work, (activations, usize::MAX), &ranks, OptimizerKind::AdamW);
        // Of the device: that is what a card has to have.
        let (got, want) = (estimate.device() as f64, record["peak_bytes"].as_f64().unwrap() + estimate.context as f64);
        if (got / want - 1.0).abs() > 0.05 {
            let what = ["model", "work", "activations", "micro_batches", "ranks", "zero_stage"]
                .map(|key| record[key].to_string());
            let gib = |bytes: f64| bytes / f64::from(1 << 30);
            wrong.push(format!(
                "{} {:?}: {:.2} GiB, measured {:.2}: {estimate:?}",
                what.join(" "),
                ranks.offload,
                gib(got),
                gib(want)
            ));
        }
    }
    assert!(measured >= 15, "{measured}");
    assert!(wrong.is_empty(), "{} of {measured}\n{}", wrong.len(), wrong.join("\n"));
}

/// Records of one rank with one micro-batch since the last layer keeps everything in batches of 4,096 to 16,384 tokens.
fn single_records() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/baselines/nvidia-h200.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let before = ["7c1c986902ac", "34d07d2", "738079e", "eba4eb3"];
    records
        .filter(|record| {
            let commit = record["commit"].as_str().unwrap();
            record["activations"].is_string()
                && !before.iter().any(|old| commit.starts_with(old))
                && record["micro_batches"].as_u64().unwrap_or(1) == 1
                && record["ranks"].as_u64().unwrap_or(1) == 1
                && record["offload_params"] != true
        })
        .collect()
}

#[test]
fn plans_take_no_more_than_what_was_measured_took_and_are_counted_within_a_twentieth_of_it() {
    let mut seen = std::collections::BTreeSet::new();
    for record in single_records() {
        let (mut work, activations, ranks) = work_of(&record);
        work.micro_batches = 1;
        let shape = shape(record["model"].as_str().unwrap(), record["lora_r"].as_u64().unwrap() as usize);
        let what = format!("{} {} {activations:?}", record["model"], record["work"]);
        let recomputed = (activations, usize::MAX);
        let plan = shape.plan(work, recomputed, 1, &Rates::H200);
        let measured = plan.with_last_whole((4096..=16384).contains(&work.tokens));
        let [now, then] = [&plan, &measured].map(|plan| shape.activations(plan, work, recomputed, 1, [0.0, 0.0]));
        let estimate = shape.estimate(work, recomputed, &ranks, OptimizerKind::AdamW);
        let of_device = estimate.device() as f64;
        assert!(now - then <= 0.01 * of_device, "{what}: {now} and {then} of {of_device}");
        let (got, want) = (of_device + then - now, record["peak_bytes"].as_f64().unwrap() + estimate.context as f64);
        assert!((got / want - 1.0).abs() < 0.05, "{what}: {got} bytes, measured {want}");
        seen.insert(what);
    }
    assert!(seen.len() >= 20, "{seen:?}");
}

#[test]
fn what_is_shared_or_waits_elsewhere_takes_less() {
    let shape = shape("configs/bench/qwen2-7b", 16);
    let work = Work {
        tokens: 2048,
        pairs: 2048 * 1024,
        targets: 2047,
        is_known: true,
        micro_batches: 1,
        rollouts: Rollouts::default(),
        has_reference: false,
    };
    let of = |world_size, stage, optimizer, params| {
        let offload = OffloadSettings { optimizer, params, ..OffloadSettings::default() };
        let ranks = RankSettings { world_size, stage, offload, ..RankSettings::default() };
        shape.estimate(work, (Activations::Recompute, usize::MAX), &ranks, OptimizerKind::AdamW)
    };
    let (none, cpu) = (OffloadDevice::None, OffloadDevice::Cpu);
    let plain = of(2, ZeroStage::Replicated, none, none);
    let mut before = plain.device() + 1;
    for stage in [ZeroStage::Replicated, ZeroStage::Optimizer, ZeroStage::Gradients, ZeroStage::Parameters] {
        let device = of(2, stage, none, none).device();
        assert!(device < before, "{stage:?}");
        before = device;
    }
    assert_eq!(of(1, ZeroStage::Parameters, none, none), of(1, ZeroStage::Replicated, none, none));
    let both = of(1, ZeroStage::Replicated, cpu, cpu);
    assert!(both.device() < of(1, ZeroStage::Replicated, none, cpu).device());
    assert_eq!((both.optimizer, both.weights), (0, 0));
    assert!(both.host > plain.host + plain.weights);
    assert_eq!(plain.optimizer, 8 * shape.num_trained());
    // What lies in files is not in host memory, but for what passes through it.
    let nvme = OffloadDevice::Nvme;
    assert_eq!((both.files, plain.files), (0, 0));
    let in_files = of(1, ZeroStage::Replicated, nvme, nvme);
    assert_eq!(in_files.device(), both.device());
    // The trained values lie there as blocks read them, too.
    let read: u64 = shape.read.iter().sum();
    assert!(read < 4 * shape.num_trained());
    assert_eq!(in_files.files, plain.weights + 12 * shape.num_trained() + read);
    assert!(in_files.host < both.host - in_files.files / 2, "{in_files:?} {both:?}");
    // Gradients stay in host memory.
    assert!(in_files.host > shape.table + 4 * shape.num_trained());
    let halves = of(2, ZeroStage::Parameters, nvme, nvme);
    assert!(halves.files.abs_diff(in_files.files / 2) < 1000, "{} {}", halves.files, in_files.files);
    let with_reference = |offload| {
        let ranks = RankSettings { offload, ..RankSettings::default() };
        let of = |has_reference| {
            shape.estimate(
                Work { has_reference, ..work },
                (Activations::Recompute, usize::MAX),
                &ranks,
                OptimizerKind::AdamW,
            )
        };
        (of(true).device() - of(false).device(), of(true).host - of(false).host)
    };
    let copy = 4 * shape.num_trained();
    assert_eq!(with_reference(OffloadSettings::default()), (copy, 0));
    assert_eq!(with_reference(OffloadSettings { optimizer: cpu, ..OffloadSettings::default() }), (0, copy + read));
}

#[test]
fn inputs_of_micro_batches_that_pass_together_are_counted() {
    let shape = shape("configs/bench/qwen2-7b", 16);
    let of = |stage, params, backend, tokens, micro_batches| {
        let work = Work {
            tokens,
            pairs: 1024 * tokens,
            targets: tokens,
            is_known: true,
            micro_batches,
            rollouts: Rollouts::default(),
            has_reference: false,
        };
        let offload = OffloadSettings { params, ..OffloadSettings::default() };
        let ranks = RankSettings { world_size: 2, stage, offload, backend, ..RankSettings::default() };
        let of = |activations| shape.estimate(work, (activations, usize::MAX), &ranks, OptimizerKind::AdamW);
        (of(Activations::Recompute).activations, of(Activations::Keep).activations)
    };
    let (none, cpu, nccl, gloo) = (OffloadDevice::None, OffloadDevice::Cpu, RankBackend::Nccl, RankBackend::Gloo);
    // Of one micro-batch of 2,048 tokens.
    let inputs = 2048.0 * 28.0 * shape.costs.bytes(Leaf::Input) as f64;
    let more = |stage, params, backend, tokens| {
        let (one, many) = (of(stage, params, backend, tokens, 1), of(stage, params, backend, tokens, 32));
        ((many.0 - one.0) as f64 / inputs, many.1 - one.1)
    };
    for (params, others) in [(none, 1.0), (cpu, 3.0)] {
        let (recomputed, kept) = more(ZeroStage::Parameters, params, nccl, 2048);
        assert!((others - 0.1..others + 0.5).contains(&recomputed), "{others} more at a time: {recomputed}");
        assert_eq!(kept, 0, "activations that stay are too many for that");
        assert_eq!(more(ZeroStage::Parameters, params, nccl, 8192), (0.0, 0), "long ones hide what comes");
        assert!(more(ZeroStage::Parameters, params, gloo, 2048).0 > 30.0, "breadth first");
    }
    assert_eq!(more(ZeroStage::Gradients, none, nccl, 2048), (0.0, 0), "all blocks are there");
}

#[test]
fn what_is_asked_to_stay_is_counted() {
    let shape = shape("configs/bench/qwen2-7b", 16);
    let work = Work {
        tokens: 2048,
        pairs: 2048 * 1024,
        targets: 2047,
        is_known: true,
        micro_batches: 1,
        rollouts: Rollouts::default(),
        has_reference: false,
    };
    let of = |layers, max_live_parameters| {
        let offload = OffloadSettings { params: OffloadDevice::Cpu, max_live_parameters, ..OffloadSettings::default() };
        let ranks = RankSettings { offload, ..RankSettings::default() };
        shape.estimate(work, (Activations::Recompute, layers), &ranks, OptimizerKind::AdamW).device()
    };
    let least = of(usize::MAX, None);
    assert_eq!(of(28, None), least);
    assert_eq!(of(usize::MAX, Some(1)), least, "two blocks are there in any case");
    assert!(of(14, None) > least && of(7, None) > of(14, None));
    let (some, all) = (of(usize::MAX, Some(3_000_000_000)), of(usize::MAX, Some(20_000_000_000)));
    assert!(some > least && all > some);
    let ranks = RankSettings::default();
    let resident = shape.estimate(work, (Activations::Recompute, usize::MAX), &ranks, OptimizerKind::AdamW);
    assert!((all as f64 / resident.device() as f64 - 1.0).abs() < 0.01, "{all} and {}", resident.device());
}

/// All weights of a model of some shape, trained on a CPU's store that keeps them apart, as a GPU's would.
#[test]
fn trained_values_are_counted_as_blocks_read_them() {
    use crate::model::params::{BlockInit, SharedParam, Trainable};
    use crate::zero::{Error, Offload, ParamStore, Sharing};
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/bench/qwen25-05b");
    let (mut config, _) = WeightSource::open(&path, Some(1)).unwrap();
    // Small enough to be allocated.
    (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size) = (3, 128, 256, 1024);
    (config.num_attention_heads, config.num_key_value_heads, config.head_dim) = (4, 2, 32);
    for is_tied in [true, false] {
        config.tie_word_embeddings = is_tied;
        for types in [Types::BF16, Types::F16, Types::F32] {
            let shape = Shape::of(config.clone(), None, None, 2, types).unwrap();
            for params in [false, true] {
                let layers = config.num_hidden_layers;
                let mut blocks: Vec<BlockInit> = (0..layers + 2).map(|_| BlockInit::default()).collect();
                for tensor in config.tensors() {
                    let layer = tensor.name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
                    let block = match (layer, tensor.role) {
                        (Some(layer), _) => 1 + layer.parse::<usize>().unwrap(),
                        (None, TensorRole::Embedding) => 0,
                        (None, _) => layers + 1,
                    };
                    blocks[block].trainable.push(Trainable {
                        values: vec![0.5; tensor.shape.iter().product()],
                        name: tensor.name,
                        shape: tensor.shape,
                        has_decay: true,
                    });
                }
                if is_tied {
                    let of_name = "model.embed_tokens.weight".into();
                    blocks[layers + 1].shared.push(SharedParam { name: "lm_head.weight".into(), of_block: 0, of_name });
                }
                let place = Offload { optimizer: true, params, types: types.read(), ..Offload::default() };
                let blocks = blocks.into_iter().map(Ok::<_, Error>);
                let store = ParamStore::placed(blocks, &candle_core::Device::Cpu, Sharing::alone(), place).unwrap();
                let (none, cpu) = (OffloadDevice::None, OffloadDevice::Cpu);
                let offload = OffloadSettings {
                    optimizer: cpu,
                    params: if params { cpu } else { none },
                    ..OffloadSettings::default()
                };
                let ranks = RankSettings { offload, ..RankSettings::default() };
                let work = Work {
                    tokens: 256,
                    pairs: 256 * 128,
                    targets: 255,
                    is_known: true,
                    micro_batches: 1,
                    rollouts: Rollouts::default(),
                    has_reference: false,
                };
                let activations = (Activations::Recompute, usize::MAX);
                let estimate = shape.estimate(work, activations, &ranks, OptimizerKind::AdamW);
                let what = format!("{types:?}, tied: {is_tied}, parameters wait: {params}");
                let near = |got: u64, want: usize| {
                    assert!((got as f64 - want as f64).abs() <= 0.02 * want as f64, "{what}: {got}, {want}");
                };
                near(estimate.trained, store.computed_bytes());
                let layer = shape.read[1..=layers].iter().max().copied().unwrap();
                near(if params { layer } else { 0 }, store.layer_bytes().from_host);
                // Gradients of a step pass; those of a resident optimizer stay, a tied head's with them.
                let resident = shape.estimate(work, activations, &RankSettings::default(), OptimizerKind::AdamW);
                let table = if is_tied { config.vocab_size * config.hidden_size } else { 0 };
                assert_eq!(resident.gradients, 4 * (shape.num_trained() + table as u64), "{what}");
                let host =
                    store.num_kept() * 4 + store.gradient_bytes() + 2 * 4 * store.num_kept() + store.packed_bytes();
                let beside = shape.rounding(&ranks, ZeroStage::Replicated);
                assert_eq!(beside == 0, types == Types::F32);
                near(estimate.host - beside, host);
            }
        }
    }
}

/// What was asked for: all weights of a 0.5B model in bf16 with the optimizer elsewhere, in 3 GiB of a GPU.
#[test]
fn all_weights_of_a_small_model_fit_three_gibibytes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/bench/qwen25-05b");
    let (config, _) = WeightSource::open(&path, Some(1)).unwrap();
    let of = |types| {
        let shape = Shape::of(config.clone(), None, None, 2, types).unwrap();
        let offload = OffloadSettings { optimizer: OffloadDevice::Cpu, ..OffloadSettings::default() };
        let work = Work {
            tokens: 512,
            pairs: 512 * 256,
            targets: 511,
            is_known: true,
            micro_batches: 1,
            rollouts: Rollouts::default(),
            has_reference: false,
        };
        let ranks = RankSettings { offload, ..RankSettings::default() };
        shape.estimate(work, (Activations::Recompute, usize::MAX), &ranks, OptimizerKind::AdamW)
    };
    let (halves, floats) = (of(Types::BF16), of(Types::F32));
    assert!(halves.device() < 3 << 30 && floats.device() > 3 << 30, "{halves:?} {floats:?}");
    assert!(halves.trained.abs_diff(floats.trained / 2) < 1 << 20, "{halves:?} {floats:?}");
}

/// The phases of GRPO, by the functions with which a rollout sizes its memory.
#[test]
fn rollouts_are_counted_as_they_size_their_memory() {
    use crate::rollout::KvShape;
    use crate::rollout::sizes::{Generating, Stored, cache_pages, least_pages};
    let shape = shape("configs/bench/qwen2-7b", 16);
    let rollouts = Rollouts { at_once: 64, longest: 128 + 1024 - 1 };
    let work = Work {
        tokens: 2048,
        pairs: 2048 * 1024,
        targets: 2000,
        is_known: false,
        micro_batches: 1,
        rollouts,
        has_reference: false,
    };
    let of = |world_size, stage, offload: OffloadSettings, work: Work| {
        let ranks = RankSettings { world_size, stage, offload, ..RankSettings::default() };
        shape.estimate(work, (Activations::Recompute, usize::MAX), &ranks, OptimizerKind::AdamW)
    };
    let none = OffloadSettings::default();
    let one = of(1, ZeroStage::Replicated, none.clone(), work);
    let page = KvShape::of(&shape.config, shape.types).page_bytes();
    assert_eq!(one.kv_cache, (page * cache_pages(64, rollouts.longest)) as u64);
    assert_eq!(one.at_least().kv_cache, (page * least_pages(rollouts.longest)) as u64);
    assert_eq!(shape.adapter_ranks, [16; 7]);
    let generating =
        |stored, adapter_ranks| Generating { config: &shape.config, types: shape.types, stored, adapter_ranks };
    let recorded = generating(Stored::Packed, [16; 7]).bytes(64, rollouts.longest).unwrap();
    assert_eq!(one.rollout, recorded.steps + recorded.adapters);
    // Prompts are computed in shorter pieces where the cache lacks room.
    assert_eq!(one.at_least().rollout, recorded.least_steps + recorded.adapters);
    let spared = recorded.steps - recorded.least_steps;
    assert!((160 << 20..320 << 20).contains(&spared), "{spared}");
    // Logits of 64 sequences, and rows and partial sums beside them.
    let plain = generating(Stored::Otherwise, [16; 7]).bytes(64, rollouts.longest).unwrap();
    let more = recorded.steps - plain.steps;
    assert!(more > 4 * 64 * 152_064 && more < 512 << 20 && plain.adapters == 0, "{recorded:?} {plain:?}");
    // The As of a group in up to three orders, and each B, in 16 bits with whole steps of ranks.
    let values: u64 = shape.trained[1..=28].iter().sum();
    assert!(recorded.adapters > 2 * values && recorded.adapters < 2 * 3 * values, "{recorded:?} {values}");
    // Without recorded steps all sequences are computed at once, with them as many as kernels take.
    let [few, many] = [Stored::Packed, Stored::Otherwise]
        .map(|stored| generating(stored, [16; 7]).bytes(1000, rollouts.longest).unwrap());
    assert_eq!(few.cache, (page * cache_pages(256, rollouts.longest)) as u64);
    assert_eq!(many.cache, (page * cache_pages(1000, rollouts.longest)) as u64);

    // Both phases, and the larger of them.
    assert_eq!(one.device(), one.training().max(one.generating()));
    assert!(one.generating() > one.training());
    let short = Work { rollouts: Rollouts { at_once: 1, longest: 64 }, tokens: 32_768, targets: 32_000, ..work };
    let short = of(1, ZeroStage::Replicated, none.clone(), short);
    assert!(short.device() == short.training() && short.generating() > 0, "{short:?}");
    let sft = of(1, ZeroStage::Replicated, none.clone(), Work { rollouts: Rollouts::default(), ..work });
    assert_eq!((sft.generating(), sft.kv_cache, sft.rollout, sft.device()), (0, 0, 0, sft.training()));
    // Gradients of a resident optimizer stay while it generates.
    assert_eq!(one.kept_gradients, 4 * shape.num_trained());
    let cpu = OffloadDevice::Cpu;
    let away = of(1, ZeroStage::Replicated, OffloadSettings { optimizer: cpu, ..none.clone() }, work);
    assert_eq!(away.kept_gradients, 0);
    // Ranks in stage 3 have all weights while they generate, and cannot do without; one rank that waits for its weights can.
    let whole: u64 = shape.frozen.iter().sum();
    let third = of(4, ZeroStage::Parameters, none.clone(), work);
    assert!(third.rollout > recorded.steps + whole / 2 && third.kv_cache == one.kv_cache, "{third:?}");
    let waits = of(1, ZeroStage::Replicated, OffloadSettings { params: cpu, ..none }, work);
    assert_eq!((waits.rollout, waits.kv_cache), (one.rollout, one.kv_cache + whole));
    let least = waits.at_least();
    let more = least.kv_cache - one.at_least().kv_cache;
    assert!(more > whole / 40 && more < whole / 2, "{least:?}");
}

/// All weights trained: from f32 values tokens are generated step by step, from rounded ones by recorded steps.
#[test]
fn weights_that_are_rounded_are_generated_from_by_recorded_steps() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/bench/qwen25-05b");
    let (config, _) = WeightSource::open(&path, Some(1)).unwrap();
    assert!(config.tie_word_embeddings);
    let rollouts = Rollouts { at_once: 16, longest: 512 };
    for (types, is_recorded) in [(Types::BF16, true), (Types::F16, false), (Types::F32, false)] {
        let shape = Shape::of(config.clone(), None, None, 2, types).unwrap();
        let [rounded, floats] = [true, false].map(|is_rounded| shape.rollout(rollouts, is_rounded));
        // In f16 the table that the tied head multiplies with stays f32.
        assert_eq!(rounded.steps > floats.steps, is_recorded, "{types:?}: {rounded:?} {floats:?}");
        assert_eq!((rounded.cache, rounded.adapters), (floats.cache, 0));
    }
}
