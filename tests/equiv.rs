//! What must not matter: packing, micro-batch splits, shared prompts, recomputation, threads, paging, ranks; and candle's own
//! Qwen models as an independent oracle for logits.

#[path = "equiv/layer.rs"]
mod layer;
#[path = "equiv/ranks.rs"]
mod ranks;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{qwen2, qwen3};
use trainer::config::settings::{
    LoraSettings, ModelSettings, ModuleSet, OptimizerKind, OptimizerSettings, QuantType, Quantization,
    SamplingSettings, WeightDtype,
};
use trainer::engine::{self, Activations, DropoutKey, Engine, Order, Speaker, Types, neftune_noise};
use trainer::model::HeadGradient;
use trainer::model::batch::{Batch, BatchBuilder};
use trainer::model::load::{Purpose, load};
use trainer::model::params::BlockInit;
use trainer::ops::{buffer, head};
use trainer::rng::Stream;
use trainer::rollout::forward::EngineModel;
use trainer::rollout::{Caller, Request, Rollout, RolloutSettings};
use trainer::zero::{self, Files, Needs, Offload, ParamStore, ShardedOptimizer, Sharing, Slots, Visit};

/// Sums of f32 products in another order, relative to the largest gradient of a block.
const REORDERED: f32 = 1e-4;
/// Log-probabilities from the cached decoder (few rows, straight from packed bytes) and from the trainer.
const DECODER: f32 = 1e-4;
/// Logits of two f32 implementations of the same model.
const ORACLE: f32 = 2e-4;

fn config(architecture: &str, is_tied: bool) -> String {
    let (class, head_dim) = match architecture {
        "qwen2" => ("Qwen2ForCausalLM", 16),
        _ => ("Qwen3ForCausalLM", 24),
    };
    format!(
        r#"{{"architectures": ["{class}"], "model_type": "{architecture}", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": {head_dim},
        "vocab_size": 300, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": {is_tied}, "use_sliding_window": false, "sliding_window": 4096,
        "max_window_layers": 3, "attention_bias": false, "initializer_range": 0.1, "torch_dtype": "float32",
        "bos_token_id": null, "eos_token_id": 1}}"#
    )
}

/// An engine with random weights; with `dropout` the model carries LoRA on NF4, else every weight is trained.
fn engine(architecture: &str, dropout: Option<f64>, recompute: bool) -> Engine {
    engine_of(architecture, dropout.map(|dropout| lora(dropout, ModuleSet::AllLinear, &[])), recompute)
}

fn lora(dropout: f64, target_modules: ModuleSet, modules_to_save: &[&str]) -> LoraSettings {
    let modules_to_save = modules_to_save.iter().map(|name| (*name).into()).collect();
    LoraSettings { r: 8, alpha: 16.0, dropout, target_modules, modules_to_save, use_rslora: false, use_dora: false }
}

/// An engine with random weights; with an adapter on NF4, else every weight is trained.
fn engine_of(architecture: &str, lora: Option<LoraSettings>, recompute: bool) -> Engine {
    engine_in(architecture, lora, recompute, None)
}

/// As [`engine_of`], with its layers in slots if some are named.
fn engine_in(architecture: &str, lora: Option<LoraSettings>, recompute: bool, slots: Option<Slots>) -> Engine {
    let engine = engine_with(architecture, lora, recompute, |blocks| match slots {
        Some(slots) => ParamStore::with_slots(blocks, &Device::Cpu, slots),
        None => ParamStore::new(blocks, &Device::Cpu),
    });
    shift(&engine);
    engine
}

/// Moves values from where they start: `lora_B` starts at zero, which would hide half of the adapter.
fn shift(engine: &Engine) {
    for (block, flat) in engine.store().flats().enumerate().filter(|(_, flat)| !flat.is_empty()) {
        let mut values = buffer::to_vec(&flat.values().unwrap()).unwrap();
        let mut stream = Stream::new(5, "equivalence tests", 0, block as u64);
        values.iter_mut().for_each(|v| *v += 0.02 * stream.normal() as f32);
        engine.store().write_values(block, &values).unwrap();
    }
}

/// Loaded blocks in the order of the walk.
type Blocks<'a> = &'a mut dyn Iterator<Item = Result<BlockInit, zero::Error>>;

/// An engine as it is loaded, over a store of its blocks.
fn engine_with(
    architecture: &str,
    lora: Option<LoraSettings>,
    recompute: bool,
    store: impl FnOnce(Blocks<'_>) -> Result<ParamStore, zero::Error>,
) -> Engine {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config(architecture, true)).unwrap();
    let settings = ModelSettings {
        model_name_or_path: String::new(),
        model_revision: "main".into(),
        tokenizer_name_or_path: None,
        chat_template: None,
        chat_template_path: None,
        eos_token: None,
        init_random: true,
        dtype: WeightDtype::Auto,
        quantization: lora.as_ref().map(|_| Quantization { quant_type: QuantType::Nf4, double_quant: true }),
        lora,
        adapter_name_or_path: None,
    };
    let loaded = load(folder.path(), &settings, 5, Purpose::Training, &Device::Cpu).unwrap();
    let store = store(&mut loaded.blocks.map(Result::unwrap).map(Ok)).unwrap();
    let activations = if recompute { Activations::Recompute } else { Activations::Keep };
    Engine::new(loaded.config, loaded.adapter, store, Types::F32, activations)
}

fn sequence(length: usize, item: u64) -> Vec<u32> {
    let mut stream = Stream::new(5, "sequences", 0, item);
    (0..length).map(|_| stream.below(300) as u32).collect()
}

/// Gradients of the sum of all asked log-probabilities (and a little entropy), over `batches`.
fn gradients(engine: &Engine, batches: &[Batch]) -> Vec<Vec<f32>> {
    let dropout = Some(DropoutKey { seed: 9, step: 2 });
    let mut loss = |_: usize, head: &head::Output| {
        let d_logprobs = vec![1.0; head.logprobs.len()];
        let d_entropies = vec![0.1; head.logprobs.len()];
        Ok::<_, engine::Error>(HeadGradient { d_logprobs, d_entropies, ..HeadGradient::default() })
    };
    engine.accumulate(batches, 0.9, dropout, &mut loss).unwrap();
    engine.store().flats().map(|flat| buffer::to_vec(flat.grads()).unwrap()).collect()
}

fn logprobs(engine: &Engine, batch: &Batch, speaker: Speaker, temperature: f64) -> head::Output {
    engine.logprobs(std::slice::from_ref(batch), speaker, temperature).unwrap().remove(0)
}

#[track_caller]
fn assert_close(left: &[Vec<f32>], right: &[Vec<f32>]) {
    let mut compared = 0;
    for (left, right) in left.iter().zip(right) {
        let scale = right.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        let worst = left.iter().zip(right).fold(0.0f32, |m, (l, r)| m.max((l - r).abs()));
        assert!(worst / scale < REORDERED, "gradients differ by {worst} of {scale}");
        compared += left.len();
    }
    assert!(compared > 0);
}

fn packed(sequences: &[(u64, Vec<u32>)]) -> Batch {
    let mut builder = BatchBuilder::new();
    for (sample, tokens) in sequences {
        let rows = builder.push(tokens, *sample);
        builder.predict_within(rows);
    }
    builder.build().unwrap()
}

#[test]
fn packing_and_micro_batch_splits_give_the_same_gradients() {
    let sequences: Vec<(u64, Vec<u32>)> =
        [3, 70, 1, 20, 33].iter().zip(0..).map(|(&n, i)| (i, sequence(n, i))).collect();
    for (architecture, dropout) in [("qwen2", None), ("qwen2", Some(0.3)), ("qwen3", Some(0.0)), ("qwen3", None)] {
        let engine = engine(architecture, dropout, false);
        let together = gradients(&engine, &[packed(&sequences)]);
        let alone: Vec<Batch> = sequences.chunks(1).map(packed).collect();
        assert_close(&gradients(&engine, &alone), &together);
        let pairs: Vec<Batch> = sequences.chunks(2).map(packed).collect();
        assert_close(&gradients(&engine, &pairs), &together);
    }
}

#[test]
fn an_adapter_on_both_ends_is_cut_and_recomputed_as_the_others() {
    let sequences: Vec<(u64, Vec<u32>)> = [3, 70, 1, 20].iter().zip(0..).map(|(&n, i)| (i, sequence(n, i))).collect();
    let targets = ModuleSet::Pattern(r".*(q_proj|down_proj|lm_head|embed_tokens)".into());
    for dropout in [0.0, 0.3] {
        let engine = |recompute| engine_of("qwen2", Some(lora(dropout, targets.clone(), &["norm"])), recompute);
        let kept = engine(false);
        let names: Vec<String> =
            kept.store().flats().flat_map(|flat| flat.entries().iter().map(|e| e.name.clone())).collect();
        for name in ["model.embed_tokens.lora_embedding_A", "lm_head.lora_B.weight", "model.norm.weight"] {
            assert!(names.iter().any(|n| n == name), "{name}: {names:?}");
        }
        let together = gradients(&kept, &[packed(&sequences)]);
        assert!(together.iter().filter(|block| !block.is_empty()).all(|block| block.iter().any(|g| *g != 0.0)));
        let alone: Vec<Batch> = sequences.chunks(1).map(packed).collect();
        assert_close(&gradients(&kept, &alone), &together);
        assert_eq!(gradients(&engine(true), &[packed(&sequences)]), together);
    }
}

#[test]
fn noise_on_embeddings_has_its_size_and_does_not_depend_on_the_cut_of_a_batch() {
    let (alpha, d) = (5.0, 64);
    let sequences: Vec<(u64, Vec<u32>)> = [400, 25, 90].iter().zip(0..).map(|(&n, i)| (i, sequence(n, i))).collect();
    let key = DropoutKey { seed: 9, step: 2 };
    let together = neftune_noise(&packed(&sequences), d, alpha, key);
    let mut start = 0;
    for one in sequences.chunks(1) {
        let own = neftune_noise(&packed(one), d, alpha, key);
        let length = one[0].1.len();
        assert_eq!(own, together[start..start + length * d], "of {length} tokens");
        start += own.len();
        // Uniform: the variance is a third of the square of the largest value.
        let largest = alpha / (length as f64 * d as f64).sqrt();
        let mean = own.iter().map(|&v| f64::from(v)).sum::<f64>() / own.len() as f64;
        let variance = own.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / own.len() as f64;
        assert!(own.iter().all(|&v| f64::from(v).abs() <= largest * 1.000_001));
        assert!(mean.abs() < 0.1 * largest && (variance / (largest * largest / 3.0) - 1.0).abs() < 0.1);
    }
    assert_ne!(neftune_noise(&packed(&sequences), d, alpha, DropoutKey { seed: 9, step: 3 }), together);

    let mut engine = engine("qwen2", Some(0.1), false);
    let (batch, plain) = (packed(&sequences), gradients(&engine, &[packed(&sequences)]));
    let before = logprobs(&engine, &batch, Speaker::Policy, 1.0);
    engine.set_neftune_noise_alpha(Some(alpha));
    let noisy = gradients(&engine, &[packed(&sequences)]);
    assert_ne!(noisy, plain);
    let alone: Vec<Batch> = sequences.chunks(1).map(packed).collect();
    assert_close(&gradients(&engine, &alone), &noisy);
    assert_eq!(logprobs(&engine, &batch, Speaker::Policy, 1.0), before, "without training there is no noise");
    engine.set_neftune_noise_alpha(None);
    assert_eq!(gradients(&engine, &[packed(&sequences)]), plain);
}

#[test]
fn a_shared_prompt_gives_the_gradients_of_repeated_prompts() {
    let engine = engine("qwen2", Some(0.0), true);
    let prompts = [sequence(40, 100), sequence(1, 101)];
    let completions: Vec<Vec<u32>> = (0..6).map(|i| sequence(2 + 7 * i as usize, 200 + i)).collect();
    let (mut shared, mut repeated) = (BatchBuilder::new(), BatchBuilder::new());
    for (prompt, group) in prompts.iter().zip(completions.chunks(3)) {
        let prompt_rows = shared.push(prompt, 1);
        for completion in group {
            let rows = shared.push_after(prompt_rows.clone(), completion, 2);
            shared.predict(prompt_rows.end - 1, completion[0]);
            shared.predict_within(rows);
            let whole = repeated.push(&[prompt.as_slice(), completion].concat(), 1);
            repeated.predict_within(whole.start + prompt.len() - 1..whole.end);
        }
    }
    let (shared, repeated) = (shared.build().unwrap(), repeated.build().unwrap());
    assert!(shared.tokens.len() < repeated.tokens.len());
    let left = logprobs(&engine, &shared, Speaker::Policy, 1.0);
    let right = logprobs(&engine, &repeated, Speaker::Policy, 1.0);
    assert!(left.logprobs.iter().zip(&right.logprobs).all(|(l, r)| (l - r).abs() < DECODER));
    assert_close(&gradients(&engine, &[shared]), &gradients(&engine, &[repeated]));
}

#[test]
fn recomputation_and_threads_change_no_bit() {
    let batch = packed(&[(1, sequence(65, 1)), (2, sequence(30, 2))]);
    for dropout in [None, Some(0.2)] {
        let kept = gradients(&engine("qwen3", dropout, false), std::slice::from_ref(&batch));
        assert_eq!(kept, gradients(&engine("qwen3", dropout, true), std::slice::from_ref(&batch)));
        let mut in_part = engine("qwen3", dropout, true);
        in_part.set_recomputed_layers(1);
        assert_eq!(kept, gradients(&in_part, std::slice::from_ref(&batch)), "one layer of several");
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let engine = engine("qwen3", dropout, true);
            assert_eq!(kept, pool.install(|| gradients(&engine, std::slice::from_ref(&batch))), "{threads} threads");
        }
    }
}

/// Micro-batches of several lengths, one of them without a target.
fn step_of(micro_steps: u64) -> Vec<Batch> {
    let batch = |i: u64| packed(&[(2 * i, sequence(5 + 11 * i as usize % 37, 2 * i)), (2 * i + 1, sequence(9, i))]);
    let mut step: Vec<Batch> = (0..micro_steps).map(batch).collect();
    if micro_steps > 2 {
        step[1] = packed(&[(90, sequence(1, 90))]);
        assert!(step[1].targets.is_empty());
    }
    step
}

/// What is trained: everything (with a tied table), adapters, adapters and whole weights on both ends.
fn kinds() -> Vec<(&'static str, Option<LoraSettings>)> {
    let ends = ModuleSet::Pattern(r".*(q_proj|down_proj|lm_head|embed_tokens)".into());
    vec![
        ("qwen2", None),
        ("qwen3", Some(lora(0.2, ModuleSet::AllLinear, &[]))),
        ("qwen2", Some(lora(0.3, ends, &["norm"]))),
        ("qwen2", Some(lora(0.0, ModuleSet::AllLinear, &["embed_tokens"]))),
    ]
}

#[test]
fn all_orders_of_a_step_give_the_same_bits() {
    for (architecture, lora) in kinds() {
        for recompute in [false, true] {
            for micro_steps in [1, 3, 4, 6, 8] {
                let step = step_of(micro_steps);
                let in_order = |order| {
                    let mut engine = engine_of(architecture, lora.clone(), recompute);
                    engine.force_order(Some(order));
                    assert_eq!(engine.order_of(&step).unwrap(), order);
                    let first = gradients(&engine, &step);
                    assert_eq!(gradients(&engine, &step), first, "a second step starts at zero");
                    first
                };
                let depth_first = in_order(Order::DepthFirst);
                assert!(depth_first.iter().flatten().any(|&g| g != 0.0));
                for order in [Order::Grouped(2), Order::Grouped(5), Order::BreadthFirst] {
                    assert_eq!(in_order(order), depth_first, "{architecture} {lora:?} {micro_steps} {order:?}");
                }
            }
        }
    }
}

#[test]
fn sums_over_a_step_are_those_of_ranks_that_share_it() {
    for (architecture, lora) in kinds() {
        let (engine, step) = (engine_of(architecture, lora, true), step_of(8));
        let whole = gradients(&engine, &step);
        for ranks in [2, 4] {
            let mut sums: Vec<_> = step.chunks(8 / ranks).map(|own| gradients(&engine, own)).collect();
            while sums.len() > 1 {
                let add = |pair: &[Vec<Vec<f32>>]| -> Vec<Vec<f32>> {
                    let blocks = pair[0].iter().zip(&pair[1]);
                    blocks.map(|(left, right)| left.iter().zip(right).map(|(l, r)| l + r).collect()).collect()
                };
                sums = sums.chunks(2).map(add).collect();
            }
            // A tied table is added up in two parts, each over all ranks.
            let tied = usize::from(!engine.store().at_rest(0).unwrap().iter().any(|(_, slot)| slot.grad.is_none()));
            assert_eq!(sums[0][tied..], whole[tied..], "{architecture} over {ranks}");
            assert_close(&sums[0], &whole);
        }
    }
}

#[test]
fn a_block_in_a_slot_is_read_while_it_is_lent_and_no_longer() {
    let slots = Some(Slots { most_live: 1, is_spoiled: true });
    for (architecture, lora) in kinds() {
        for recompute in [false, true] {
            let resident = engine_of(architecture, lora.clone(), recompute);
            let mut lent = engine_in(architecture, lora.clone(), recompute, slots);
            let (step, layers, blocks) = (step_of(4), 3, 5);
            for order in [Order::DepthFirst, Order::BreadthFirst] {
                lent.force_order(Some(order));
                let before = lent.store().fetches();
                assert_eq!(gradients(&lent, &step), gradients(&resident, &step), "{architecture} {lora:?} {order:?}");
                let sweeps = if order == Order::DepthFirst { step.len() } else { 1 };
                let visits = sweeps * (2 * (layers + 1) + 1);
                assert_eq!(lent.store().fetches() - before, visits as u64, "{order:?}");
            }
            let before = lent.store().fetches();
            let outputs = lent.logprobs(&step, Speaker::Policy, 0.7).unwrap();
            assert_eq!(outputs, resident.logprobs(&step, Speaker::Policy, 0.7).unwrap());
            assert_eq!(lent.store().fetches() - before, blocks, "all batches in one walk");
            lent.force_order(None);
            assert_eq!(lent.order_of(&step).unwrap(), Order::BreadthFirst);
        }
    }
}

/// Completions of an engine whose blocks come for each step of generation where they are not all there.
fn completions(engine: &Engine) -> Vec<Vec<u32>> {
    let request = |i: u64| Request { sample_id: i, prompt_ids: sequence(7, 300 + i / 2), group: i as usize / 2 };
    let requests: Vec<Request> = (0..4).map(request).collect();
    let settings = RolloutSettings {
        max_num_seqs: 3,
        max_batch_tokens: 32,
        kv_cache_bytes: usize::MAX,
        max_new_tokens: 8,
        eos_token_ids: vec![1],
    };
    let mut rollout = Rollout::new(settings).unwrap();
    let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
    let mut model = EngineModel::new(engine, true).unwrap();
    let sampling = SamplingSettings { temperature: 0.8, ..SamplingSettings::default() };
    let made = rollout.generate(&mut model, &requests, &sampling, 3, 0, &mut caller).unwrap();
    made.into_iter().map(|completion| completion.token_ids).collect()
}

#[test]
fn what_waits_in_files_computes_the_same_bits_step_after_step() {
    let settings = OptimizerSettings {
        kind: OptimizerKind::AdamW,
        weight_decay: 0.1,
        adam_beta1: 0.9,
        adam_beta2: 0.99,
        adam_epsilon: 1e-8,
    };
    for (architecture, lora) in kinds() {
        // The optimizer where blocks compute, and apart from them.
        for (optimizer, params, is_apart) in
            [(true, false, false), (false, true, false), (true, true, false), (true, false, true), (true, true, true)]
        {
            let folder = tempfile::tempdir().unwrap();
            let path = || Some(folder.path().to_path_buf());
            let files = Files {
                optimizer: path().filter(|_| optimizer),
                parameters: path().filter(|_| params),
                run: "equal".into(),
                buffer_count: 3,
            };
            let place = Offload { params, optimizer: is_apart, files, ..Offload::default() };
            let resident = engine_of(architecture, lora.clone(), true);
            let waiting = engine_with(architecture, lora.clone(), true, |blocks| {
                ParamStore::placed(blocks, &Device::Cpu, Sharing::alone(), place)
            });
            shift(&waiting);
            assert_eq!(waiting.store().holds_all(), !params);
            let step = step_of(3);
            let mut moved =
                [&resident, &waiting].map(|engine| ShardedOptimizer::new(settings, engine.store()).unwrap());
            assert_eq!(moved[1].bytes_in_file() > 0, optimizer);
            for number in 0..3 {
                assert_eq!(gradients(&waiting, &step), gradients(&resident, &step), "{architecture} {number}");
                let mut report =
                    |index: usize, engine: &Engine| moved[index].step(engine.store(), 1e-2, 1.0, 1.0).unwrap();
                assert_eq!(report(0, &resident), report(1, &waiting));
            }
            let outputs = |engine: &Engine| engine.logprobs(&step, Speaker::Policy, 0.7).unwrap();
            assert_eq!(outputs(&waiting), outputs(&resident));
            assert_eq!(completions(&waiting), completions(&resident));
            let values = |engine: &Engine| engine.store().collect_values().unwrap().unwrap();
            assert!(values(&waiting) == values(&resident));
            let moments = [(&moved[0], &resident), (&moved[1], &waiting)];
            let [left, right] = moments.map(|(optimizer, engine)| {
                let blocks = 0..engine.store().num_blocks();
                blocks.map(|block| optimizer.own_state(engine.store(), block).unwrap()).collect::<Vec<_>>()
            });
            assert!(left == right);
            let num_files = usize::from(optimizer) + usize::from(params);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), num_files);
            drop((resident, waiting, moved));
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }
}

#[test]
fn a_slot_is_refused_while_all_are_lent_and_a_walk_ends() {
    let engine = engine_in("qwen2", None, false, Some(Slots { most_live: 1, is_spoiled: true }));
    let visit = |block| Visit { block, needs: Needs::Values };
    let mut walk = engine.store().walk((0..4).map(visit).collect(), Speaker::Policy, engine.sums(1));
    let first = walk.advance().unwrap();
    assert!(walk.advance().unwrap_err().to_string().contains("no slot"));
    assert!(first.end_micro_step(0).unwrap_err().to_string().contains("without gradients"));
    drop(first);
    assert_eq!(walk.advance().unwrap().block(), 2);
    assert_eq!(walk.advance().unwrap().block(), 3);
    assert!(walk.advance().unwrap_err().to_string().contains("is over"));
}

#[test]
fn a_step_takes_the_order_that_needs_less_memory() {
    let step: Vec<Batch> = (0..4).map(|i| packed(&[(i, sequence(8, i))])).collect();
    // All weights are trained: sums laid aside are larger than the inputs of a few tokens.
    assert_eq!(engine("qwen2", None, true).order_of(&step).unwrap(), Order::BreadthFirst);
    assert_eq!(
        engine("qwen2", None, false).order_of(&step).unwrap(),
        Order::DepthFirst,
        "activations that stay are more"
    );
    assert_eq!(engine("qwen2", None, true).order_of(&step[..1]).unwrap(), Order::DepthFirst);
    let long: Vec<Batch> = (0..4).map(|i| packed(&[(i, sequence(250, i)), (9, sequence(250, 9))])).collect();
    assert_eq!(engine("qwen2", Some(0.0), true).order_of(&long).unwrap(), Order::DepthFirst);
}

#[test]
fn without_its_adapter_the_model_is_the_base() {
    let (adapted, batch) = (engine("qwen2", Some(0.0), false), packed(&[(1, sequence(20, 3))]));
    let with = logprobs(&adapted, &batch, Speaker::Policy, 1.0);
    let without = logprobs(&adapted, &batch, Speaker::Reference, 1.0);
    assert_ne!(with, without);
    for flat in adapted.store().flats().filter(|flat| !flat.is_empty()) {
        buffer::fill(&flat.values().unwrap(), 0.0).unwrap();
    }
    assert_eq!(logprobs(&adapted, &batch, Speaker::Policy, 1.0).logprobs, without.logprobs);
}

#[test]
fn a_kept_reference_is_exchanged_and_moved_without_touching_the_policy() {
    let mut engine = engine("qwen2", None, false);
    let batch = packed(&[(1, sequence(20, 3))]);
    let start = logprobs(&engine, &batch, Speaker::Policy, 1.0);
    engine.store_mut().keep_reference().unwrap();
    for flat in engine.store().flats() {
        let moved: Vec<f32> = buffer::to_vec(&flat.values().unwrap()).unwrap().iter().map(|v| v * 1.1).collect();
        buffer::write(&flat.values().unwrap(), &moved).unwrap();
    }
    let policy = logprobs(&engine, &batch, Speaker::Policy, 1.0);
    assert_ne!(policy, start);
    assert_eq!(logprobs(&engine, &batch, Speaker::Reference, 1.0), start);
    assert_eq!(logprobs(&engine, &batch, Speaker::Policy, 1.0), policy);
    engine.store().mix_reference(1.0).unwrap();
    assert_eq!(logprobs(&engine, &batch, Speaker::Reference, 1.0), policy);
}

#[test]
fn the_cached_decoder_says_what_the_trainer_says() {
    for architecture in ["qwen2", "qwen3"] {
        let engine = engine(architecture, Some(0.0), true);
        let requests: Vec<Request> = (0..9)
            .map(|i| Request {
                sample_id: i,
                prompt_ids: sequence(5 + 9 * (i as usize / 3), i / 3),
                group: i as usize / 3,
            })
            .collect();
        let mut rollout = Rollout::new(RolloutSettings {
            max_num_seqs: 4,
            max_batch_tokens: 32,
            kv_cache_bytes: usize::MAX,
            max_new_tokens: 24,
            eos_token_ids: vec![1],
        })
        .unwrap();
        let sampling = SamplingSettings { temperature: 0.8, ..SamplingSettings::default() };
        let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
        let mut model = EngineModel::new(&engine, true).unwrap();
        let completions = rollout.generate(&mut model, &requests, &sampling, 3, 0, &mut caller).unwrap();
        for (request, completion) in requests.iter().zip(&completions) {
            let mut builder = BatchBuilder::new();
            let whole = builder.push(&[request.prompt_ids.as_slice(), &completion.token_ids].concat(), 0);
            builder.predict_within(whole.start + request.prompt_ids.len() - 1..whole.end);
            let trainer = logprobs(&engine, &builder.build().unwrap(), Speaker::Policy, 0.8);
            assert_eq!(trainer.logprobs.len(), completion.logprobs.len());
            for (trainer, rollout) in trainer.logprobs.iter().zip(&completion.logprobs) {
                assert!((trainer - rollout).abs() < DECODER, "trainer {trainer}, rollout {rollout}");
            }
        }
    }
}

/// candle's own implementation of the model in `folder`: the logits after the last token of `tokens`.
fn oracle(folder: &Path, architecture: &str, tokens: &[u32]) -> Vec<f32> {
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let ids = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = if architecture == "qwen2" {
        let config: qwen2::Config = serde_json::from_value(config).unwrap();
        qwen2::ModelForCausalLM::new(&config, weights).unwrap().forward(&ids, 0).unwrap()
    } else {
        let config: qwen3::Config = serde_json::from_value(config).unwrap();
        qwen3::ModelForCausalLM::new(&config, weights).unwrap().forward(&ids, 0).unwrap()
    };
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn logits_are_those_of_candles_own_qwen_models() {
    for (architecture, is_tied) in [("qwen2", true), ("qwen2", false), ("qwen3", true), ("qwen3", false)] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config(architecture, is_tied)).unwrap();
        let settings = ModelSettings {
            model_name_or_path: String::new(),
            model_revision: "main".into(),
            tokenizer_name_or_path: None,
            chat_template: None,
            chat_template_path: None,
            eos_token: None,
            init_random: true,
            dtype: WeightDtype::Auto,
            quantization: None,
            lora: None,
            adapter_name_or_path: None,
        };
        let loaded = load(folder.path(), &settings, 5, Purpose::Training, &Device::Cpu).unwrap();
        let engine = Engine::new(
            loaded.config,
            None,
            ParamStore::new(loaded.blocks.map(Result::unwrap).map(Ok::<_, zero::Error>), &Device::Cpu).unwrap(),
            Types::F32,
            Activations::Keep,
        );
        let mut weights: HashMap<String, Tensor> = HashMap::new();
        for block in 0..engine.store().num_blocks() {
            for (name, slot) in engine.store().at_rest(block).unwrap().iter() {
                let dense = match &slot.weight {
                    trainer::quant::Weight::Dense(tensor) => tensor.copy().unwrap(),
                    packed => packed.dequantize().unwrap(),
                };
                weights.insert(name.to_string(), dense);
            }
        }
        candle_core::safetensors::save(&weights, folder.path().join("model.safetensors")).unwrap();
        for length in [1, 2, 37, 100] {
            let tokens = sequence(length, length as u64);
            let batch = packed(&[(0, tokens.clone())]);
            let ours: Vec<Vec<f32>> = engine.logits(&batch, Speaker::Policy).unwrap().to_vec2().unwrap();
            let theirs = oracle(folder.path(), architecture, &tokens);
            let worst = ours[length - 1].iter().zip(&theirs).fold(0.0f32, |m, (o, t)| m.max((o - t).abs()));
            assert!(worst < ORACLE, "{architecture} tied={is_tied} {length} tokens: logits differ by {worst}");
        }
    }
}
