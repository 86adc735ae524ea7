use std::path::Path;

use super::*;
use crate::model::source::WeightSource;

/// A model of `configs/bench` in bf16 with an adapter of rank 16 on all projections, packed to 4 bits.
fn planned(model: &str, activations: Activations) -> Planned {
    // Opening the largest one's folder asks for the memory to draw it.
    let folder = if model == "qwen25-72b" { "qwen25-32b" } else { model };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/bench").join(folder);
    let (mut config, _) = WeightSource::open(&path, Some(1)).unwrap();
    if model == "qwen25-72b" {
        (config.hidden_size, config.intermediate_size, config.num_hidden_layers) = (8192, 29_568, 80);
        config.num_attention_heads = 64;
    }
    let ranks = AdapterRanks { all: 7 * 16, carried: 6 * 16 };
    Planned {
        costs: LayerCosts::new(&config, Types::BF16.bytes(), ranks, true),
        vocabulary: config.vocab_size,
        layers: config.num_hidden_layers,
        activations,
        recomputed_layers: usize::MAX,
        is_on_gpu: true,
    }
}

/// So many sequences of so many tokens, as SFT has them.
fn sequences(count: usize, tokens: usize) -> BatchSize {
    let pairs = count * tokens * (tokens + 1) / 2;
    BatchSize { tokens: count * tokens, pairs, targets: count * (tokens - 1), is_known: true }
}

/// 4 prompts of 128 tokens with 4 completions of 256 each.
fn groups() -> BatchSize {
    let completion = 255 * 128 + 255 * 128;
    BatchSize {
        tokens: 4 * (128 + 4 * 255),
        pairs: 4 * (64 * 129 + 4 * completion),
        targets: 16 * 256,
        is_known: false,
    }
}

fn plan_with(model: &Planned, batch: BatchSize, rates: Rates) -> Plan {
    model.plan(batch, true, (&rates, &Rates::H200), None, None)
}

fn plan(model: &Planned, batch: BatchSize) -> Plan {
    plan_with(model, batch, Rates::H200)
}

/// The works of docs/benchmarks.md, and whether the last layer kept everything when they were measured.
#[test]
fn the_works_that_were_measured_get_the_plans_that_were_best() {
    use OfMixer::{Attention, Nothing, Products};
    for (model, batch, mixer, has_rows, is_last_whole) in [
        ("qwen25-05b", sequences(4, 2048), Nothing, false, true),
        ("qwen25-15b", sequences(4, 2048), Attention, false, true),
        ("qwen25-3b", sequences(4, 2048), Attention, false, true),
        ("qwen2-7b", sequences(1, 2048), Products, false, false),
        ("qwen2-7b", sequences(4, 2048), Products, true, true),
        ("qwen2-7b", sequences(1, 8192), Products, true, true),
        ("qwen2-7b", groups(), Products, true, true),
        ("qwen3-8b", sequences(1, 2048), Products, false, false),
        ("qwen25-14b", sequences(4, 2048), Products, false, true),
        ("qwen25-32b", sequences(1, 2048), Products, false, false),
    ] {
        let offload = plan(&planned(model, Activations::Offload), batch);
        let what = format!("{model}, {} tokens: {offload:?}", batch.tokens);
        assert_eq!((offload.mixer, offload.has_rows), (mixer, has_rows), "{what}");
        assert_eq!(offload.is_last_whole(), is_last_whole, "{what}");
        let recompute = plan(&planned(model, Activations::Recompute), batch);
        assert_eq!((recompute.mixer, recompute.has_rows, recompute.is_parked), (Nothing, false, false));
        assert_eq!(recompute.is_last_whole(), is_last_whole, "{model}, {} tokens: {recompute:?}", batch.tokens);
    }
    // With more tokens attention is most of the time, and the products before it are not worth their host memory.
    for tokens in [32_768, 65_536] {
        let plan = plan(&planned("qwen2-7b", Activations::Offload), sequences(1, tokens));
        assert_eq!((plan.mixer, plan.has_rows, plan.comes_late), (Attention, false, true), "{tokens}");
    }
}

#[test]
fn measured_rates_move_the_mixer_and_never_the_rows_that_would_change_bits() {
    let model = planned("qwen2-7b", Activations::Offload);
    let batch = sequences(4, 2048);
    for bus in [1e9, 4e9, 12e9, 24e9, 52e9, 1e15] {
        for products in [50e12, 300e12, 700e12, 5000e12] {
            let plan = plan_with(&model, batch, Rates { bus, products, is_measured: true, ..Rates::H200 });
            assert!(plan.has_rows && plan.is_last_whole(), "{bus} {products}");
            let without = Rates { bus: f64::INFINITY, products, ..Rates::H200 };
            let nothing = model.secs(batch, (OfMixer::Nothing, false), &without);
            let chosen = model.secs(batch, (plan.mixer, false), &Rates { bus, products, ..Rates::H200 });
            let least = model.secs(batch, (OfMixer::Nothing, false), &Rates { bus, products, ..Rates::H200 });
            assert!(chosen <= least, "{bus} {products}: {chosen} {least} {nothing}");
        }
    }
    let mixer = |bus| plan_with(&model, batch, Rates { bus, ..Rates::H200 }).mixer;
    assert_eq!([1e9, 52e9, 1e15].map(mixer), [OfMixer::Nothing, OfMixer::Products, OfMixer::Products]);
    // Nor does free memory.
    let crowded = model.plan(batch, true, (&Rates::H200, &Rates::H200), Some(0.0), None);
    assert_eq!((crowded.mixer, crowded.has_rows, crowded.last), (OfMixer::Nothing, true, Last::Whole));
}

#[test]
fn what_is_parked_hides_behind_the_layer_of_every_shape() {
    for name in
        ["qwen25-05b", "qwen25-15b", "qwen25-3b", "qwen2-7b", "qwen3-8b", "qwen25-14b", "qwen25-32b", "qwen25-72b"]
    {
        let model = planned(name, Activations::Offload);
        for tokens in [512_usize, 2048, 4096, 8192, 16_384] {
            let batch = sequences(tokens.div_ceil(2048), tokens.min(2048));
            let plan = plan(&model, batch);
            let amount = (plan.mixer, plan.has_rows);
            let parked = model.secs(batch, amount, &Rates::H200);
            let free_of_copies = model.secs(batch, (OfMixer::Nothing, false), &Rates { bus: 1e18, ..Rates::H200 });
            assert!(parked <= 1.02 * free_of_copies, "{name}, {tokens} tokens: {plan:?}, {parked} {free_of_copies}");
            assert_eq!(plan.parked_bytes(), model.parked_bytes(tokens, amount));
        }
    }
}

#[test]
fn what_stays_of_the_last_layer_fits_beside_the_least_that_the_head_needs() {
    for name in ["qwen25-05b", "qwen2-7b", "qwen3-8b", "qwen25-32b"] {
        for activations in [Activations::Recompute, Activations::Offload] {
            let model = planned(name, activations);
            let mut before = 0.0;
            for tokens in [256, 2048, 4096, 8192, 16_384, 65_536] {
                let batch = sequences(1, tokens);
                let plan = plan(&model, batch);
                let Some(bytes) = plan.last_bytes() else { continue };
                let own = bytes - model.bytes(Leaf::Input, tokens);
                let head = |strips| of_head(&model.costs, model.vocabulary, batch, strips);
                let layer = of_layer(&model.costs, tokens, false);
                let coming = model.coming(batch, plan.mixer, &Rates::H200).0;
                let beside = if plan.is_parked && !plan.comes_late { coming } else { 0.0 };
                let rows =
                    if plan.has_rows && !plan.is_last_whole() { model.bytes(Leaf::GateUp, tokens / 8) } else { 0.0 };
                assert!(
                    head(Strips::Least) + own - rows <= head(Strips::AsTheyAre).max(layer + beside),
                    "{name} {tokens}"
                );
                assert!(bytes > before, "{name} {tokens}");
                before = bytes;
            }
            // A batch whose backward comes later leaves nothing more.
            let later = model.plan(sequences(4, 2048), false, (&Rates::H200, &Rates::H200), None, None);
            assert_eq!(later.last, Last::AsOthers);
        }
        let some = Planned { recomputed_layers: 3, ..planned(name, Activations::Recompute) };
        assert_eq!(plan(&some, sequences(4, 2048)).last, Last::AsOthers, "the settings say what the last layers keep");
    }
}

#[test]
fn room_that_there_is_not_is_not_taken() {
    let model = planned("qwen2-7b", Activations::Offload);
    let batch = sequences(4, 2048);
    let with = |free: f64| model.plan(batch, true, (&Rates::H200, &Rates::H200), Some(free), None);
    let mixers = [1.0e9, 1.8e9, 2.0e9, 2.2e9, 4.0e9].map(|free| with(free).mixer);
    assert!(mixers.is_sorted() && mixers[0] == OfMixer::Nothing && mixers[4] == OfMixer::Products, "{mixers:?}");
    // What may change bits does not depend on it.
    assert!(with(1.0e9).is_last_whole() && with(1.0e9).has_rows);
}

#[test]
fn what_is_computed_again_is_what_is_not_kept() {
    let part = |layers: f64, of: f64| layers / of;
    let again = |model: &Planned, batch| plan(model, batch).computed_again();
    let recompute = planned("qwen2-7b", Activations::Recompute);
    let all = part(27.0, 28.0);
    assert_eq!(again(&recompute, sequences(4, 2048)), ComputedAgain { gate_up: all, qkv: all, attention: all });
    // At 2,048 tokens the last layer keeps its mixer.
    assert_eq!(again(&recompute, sequences(1, 2048)), ComputedAgain { gate_up: 1.0, qkv: all, attention: all });
    let offload = planned("qwen2-7b", Activations::Offload);
    let found = again(&offload, sequences(4, 2048));
    assert_eq!((found.qkv, found.attention), (0.0, 0.0));
    assert!((found.gate_up - all * 7.0 / 8.0).abs() < 1e-12, "{found:?}");
    let some = Planned { recomputed_layers: 7, ..recompute };
    let found = again(&some, sequences(4, 2048));
    assert_eq!(found, ComputedAgain { gate_up: 0.25, qkv: 0.25, attention: 0.25 });
    let keep = planned("qwen2-7b", Activations::Keep);
    assert_eq!(again(&keep, sequences(4, 2048)), ComputedAgain { gate_up: 0.0, qkv: 0.0, attention: 0.0 });
    for parked in Parked::ALL {
        let forced = offload.plan(sequences(1, 512), true, (&Rates::H200, &Rates::H200), None, Some(parked));
        assert_eq!(forced.parked_name(), Some(parked.name()));
    }
}

#[test]
fn as_many_batches_go_together_as_hide_the_next_layer() {
    let recompute = planned("qwen2-7b", Activations::Recompute);
    let batch = |tokens| BatchSize { pairs: 0, ..sequences(1, tokens) };
    let size = |tokens, bytes, rates: Rates| recompute.group_size(batch(tokens), bytes, &rates);
    let rates = Rates::H200;
    let bytes = LayerBytes { from_host: 115_000_000, from_ranks: 0 };
    assert_eq!(size(2048, bytes, rates), 2);
    assert_eq!(size(2048, bytes, Rates { bus: 1e15, ..rates }), 1);
    assert!((12..=16).contains(&size(2048, bytes, Rates { bus: 5e9, ..rates })));
    assert_eq!(size(2048, LayerBytes::default(), rates), 1);
    // Two ranks have a half each: on its card, or in host memory, from where it is copied first.
    let halves = [0, 57_500_000].map(|from_host| LayerBytes { from_host, from_ranks: 57_500_000 });
    assert_eq!(halves.map(|bytes| size(2048, bytes, rates)), [2, 4]);
    assert_eq!(halves.map(|bytes| size(8192, bytes, rates)), [1, 1]);
    assert_eq!(halves.map(|bytes| size(2048, bytes, Rates { link: 1e15, ..rates })), [1, 1]);
    // Where activations stay a gather is only to be hidden.
    let keep = planned("qwen2-7b", Activations::Keep);
    let alone = |bytes, link| keep.group_size(batch(2048), bytes, &Rates { link, ..rates });
    assert_eq!(halves.map(|bytes| alone(bytes, rates.link)), [1, 1]);
    assert_eq!(alone(halves[0], 25e9), 2);
}

#[test]
fn the_plan_says_what_becomes_of_each_half() {
    let text = |model: &Planned, batch| {
        plan(model, batch)
            .describe()
            .into_iter()
            .map(|(what, text)| format!("{what}: {text}"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    let offload = text(&planned("qwen2-7b", Activations::Offload), sequences(4, 2048));
    for part in
        ["mixer: in host memory: its input", "nothing is made again", "one row in 8", "last layer: keeps everything"]
    {
        assert!(offload.contains(part), "{part}: {offload}");
    }
    assert!(!offload.contains(" attention (") && offload.lines().count() == 3, "{offload}");
    let recompute = text(&planned("qwen3-8b", Activations::Recompute), sequences(1, 2048));
    assert!(recompute.contains("attention (") && recompute.contains("mixer: kept: its input"), "{recompute}");
    let keep = text(&planned("qwen25-32b", Activations::Keep), sequences(1, 2048));
    assert!(keep.starts_with("activations: all stay"), "{keep}");
}
