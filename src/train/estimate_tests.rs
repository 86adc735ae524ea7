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
            targets: count * (tokens - 1),
            is_known: true,
            micro_batches,
            cached_tokens: 0,
            has_reference: false,
        },
        BenchWork::Groups { prompts, samples, prompt_tokens, completion_tokens } => Work {
            tokens: prompts * (prompt_tokens + samples * (completion_tokens - 1)),
            targets: prompts * samples * completion_tokens,
            is_known: false,
            micro_batches,
            cached_tokens: 0,
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

#[test]
fn what_is_shared_or_waits_elsewhere_takes_less() {
    let shape = shape("configs/bench/qwen2-7b", 16);
    let work =
        Work { tokens: 2048, targets: 2047, is_known: true, micro_batches: 1, cached_tokens: 0, has_reference: false };
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
    assert_eq!(in_files.files, plain.weights + 12 * shape.num_trained());
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
    assert_eq!(with_reference(OffloadSettings { optimizer: cpu, ..OffloadSettings::default() }), (0, copy));
}

#[test]
fn inputs_of_micro_batches_that_pass_together_are_counted() {
    let shape = shape("configs/bench/qwen2-7b", 16);
    let of = |stage, params, backend, tokens, micro_batches| {
        let work =
            Work { tokens, targets: tokens, is_known: true, micro_batches, cached_tokens: 0, has_reference: false };
        let offload = OffloadSettings { params, ..OffloadSettings::default() };
        let ranks = RankSettings { world_size: 2, stage, offload, backend, ..RankSettings::default() };
        let of = |activations| shape.estimate(work, (activations, usize::MAX), &ranks, OptimizerKind::AdamW);
        (of(Activations::Recompute).activations, of(Activations::Keep).activations)
    };
    let (none, cpu, nccl, gloo) = (OffloadDevice::None, OffloadDevice::Cpu, RankBackend::Nccl, RankBackend::Gloo);
    // Of one micro-batch of 2,048 tokens.
    let inputs = 2048.0 * 28.0 * shape.kept_bytes()[1];
    let more = |stage, params, backend, tokens| {
        let (one, many) = (of(stage, params, backend, tokens, 1), of(stage, params, backend, tokens, 32));
        ((many.0 - one.0) as f64 / inputs, many.1 - one.1)
    };
    for params in [none, cpu] {
        let (recomputed, kept) = more(ZeroStage::Parameters, params, nccl, 2048);
        assert!((0.9..1.5).contains(&recomputed), "two at a time: {recomputed}");
        assert_eq!(kept, 0, "activations that stay are too many for that");
        assert_eq!(more(ZeroStage::Parameters, params, nccl, 8192), (0.0, 0), "long ones hide what comes");
        assert!(more(ZeroStage::Parameters, params, gloo, 2048).0 > 30.0, "breadth first");
    }
    assert_eq!(more(ZeroStage::Gradients, none, nccl, 2048), (0.0, 0), "all blocks are there");
}

#[test]
fn what_is_asked_to_stay_is_counted() {
    let shape = shape("configs/bench/qwen2-7b", 16);
    let work =
        Work { tokens: 2048, targets: 2047, is_known: true, micro_batches: 1, cached_tokens: 0, has_reference: false };
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
