//! The real Qwen2.5-Coder-0.5B-Instruct (GGUF): dequantised tensors, logits, likelihoods, greedy continuations with the
//! cached decoder. Needs the file, named by `TRAINER_QWEN05B_GGUF`; skipped with that reason otherwise.

use std::path::Path;

use anyhow::Context;
use candle_core::Device;
use serde_json::Value;
use trainer::config::settings::{SamplingSettings, WeightDtype};
use trainer::engine::{Activations, Engine, Speaker, Types};
use trainer::model::batch::BatchBuilder;
use trainer::model::load::{Purpose, load};
use trainer::model::source::WeightSource;
use trainer::ops::buffer;
use trainer::rollout::forward::EngineModel;
use trainer::rollout::{Caller, Request, Rollout, RolloutSettings};
use trainer::zero::ParamStore;

use crate::model_files::{Tensors, device, settings};
use crate::report::Report;

/// As the group's README advises for an implementation that dequantises to f32.
const LOGITS: f64 = 2e-2;
const MEAN_NLL: f64 = 1e-3;
const SUM_RELATIVE: f64 = 1e-5;
const FIRST_RELATIVE: f64 = 1e-6;
/// A greedy choice closer than this may fall either way.
const MARGIN: f64 = 0.02;
const VARIABLE: &str = "TRAINER_QWEN05B_GGUF";

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let Some(path) = std::env::var_os(VARIABLE) else {
        report.skip("all", &format!("set {VARIABLE} to qwen2.5-coder-0.5b-instruct.gguf to run these cases"));
        return Ok(());
    };
    let golden: Value = serde_json::from_slice(&std::fs::read(folder.join("real05b.json"))?)?;
    let logits = Tensors::read(&folder.join("logits.safetensors"))?;
    let path = Path::new(&path);
    check_tensors(path, &golden, report)?;
    let model = settings(None, None);
    assert_eq!(model.dtype, WeightDtype::Auto);
    let mut loaded = load(path, &model, 0, Purpose::Inference, &Device::Cpu)?;
    let device = device()?;
    if !device.is_cpu() {
        loaded.keep_embedding_on_host();
    }
    let store = ParamStore::new(loaded.blocks.map(|block| block.map_err(anyhow::Error::from)), &device)?;
    let engine = Engine::new(loaded.config, None, store, Types::F32, Activations::Keep);
    for prompt in golden["prompts"].as_array().context("prompts")? {
        check_prompt(&engine, prompt, &logits, report)?;
    }
    check_chats(&engine, golden["chats"].as_array().context("chats")?, report)
}

fn check_tensors(path: &Path, golden: &Value, report: &mut Report) -> anyhow::Result<()> {
    let (_, source) = WeightSource::open(path, None)?;
    for (name, about) in golden["dequantised_tensors"].as_object().context("dequantised_tensors")? {
        let values = buffer::to_vec(&source.tensor_f32(name)?.flatten_all()?)?;
        let number = |key: &str| about[key].as_f64().with_context(|| format!("{name} {key}"));
        let absolute = number("abs_sum")?;
        let sum: f64 = values.iter().map(|&v| f64::from(v)).sum();
        report.check(&format!("{name} sum"), (sum - number("sum")?).abs() / absolute, SUM_RELATIVE);
        let squares: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
        let expected = number("sq_sum")?;
        report.check(&format!("{name} squares"), (squares - expected).abs() / expected, SUM_RELATIVE);
        for (index, expected) in about["first8"].as_array().context("first8")?.iter().enumerate() {
            let expected = expected.as_f64().context("first8")?;
            let error = (f64::from(values[index]) - expected).abs();
            report.check(&format!("{name} [{index}]"), error, FIRST_RELATIVE * expected.abs().max(1e-3));
        }
    }
    Ok(())
}

fn ids_of(value: &Value) -> anyhow::Result<Vec<u32>> {
    Ok(serde_json::from_value(value.clone())?)
}

fn check_prompt(engine: &Engine, prompt: &Value, logits: &Tensors, report: &mut Report) -> anyhow::Result<()> {
    let index = prompt["index"].as_u64().context("index")?;
    let ids = ids_of(&prompt["ids"])?;
    let mut builder = BatchBuilder::new();
    let rows = builder.push(&ids, 0);
    builder.predict_within(rows);
    let batch = builder.build()?;
    if let Some(expected) = prompt["mean_nll"].as_f64() {
        let output = engine.logprobs(std::slice::from_ref(&batch), Speaker::Policy, 1.0)?.remove(0);
        let sum: f64 = output.logprobs.iter().map(|&l| -f64::from(l)).sum();
        let error = (sum / output.logprobs.len() as f64 - expected).abs();
        report.check(&format!("prompt {index} mean NLL"), error, MEAN_NLL);
    }
    let all: Vec<Vec<f32>> = engine.logits(&batch, Speaker::Policy)?.to_vec2()?;
    let last = all.last().context("a prompt without tokens")?;
    let top: Vec<i64> = logits.integers(&format!("prompt{index}.top50_ids"))?.concat();
    let values = logits.floats(&format!("prompt{index}.top50_values"))?;
    let error = top.iter().zip(&values).map(|(&id, v)| f64::from((last[id as usize] - v).abs())).fold(0.0, f64::max);
    report.check(&format!("prompt {index} top 50 logits"), error, LOGITS);
    Ok(())
}

/// All chats at once through the cached decoder.
fn check_chats(engine: &Engine, chats: &[Value], report: &mut Report) -> anyhow::Result<()> {
    let longest = chats.iter().filter_map(|c| c["continuation_ids"].as_array().map(Vec::len)).max().unwrap_or(1);
    let requests = chats
        .iter()
        .enumerate()
        .map(|(group, chat)| Ok(Request { sample_id: group as u64, prompt_ids: ids_of(&chat["prompt_ids"])?, group }))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut rollout = Rollout::new(RolloutSettings {
        max_num_seqs: chats.len(),
        max_batch_tokens: RolloutSettings::DEFAULT_BATCH_TOKENS,
        kv_cache_bytes: usize::MAX,
        max_new_tokens: longest,
        eos_token_ids: engine.config().stop_token_ids(),
    })?;
    let greedy = SamplingSettings { temperature: 0.0, ..SamplingSettings::default() };
    let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
    let mut model = EngineModel::new(engine, true)?;
    let completions = rollout.generate(&mut model, &requests, &greedy, 0, 0, &mut caller)?;
    for (chat, completion) in chats.iter().zip(&completions) {
        let expected = ids_of(&chat["continuation_ids"])?;
        let margins: Vec<f64> = serde_json::from_value(chat["margins"].clone())?;
        let safe = margins.iter().position(|&m| m < MARGIN).unwrap_or(expected.len());
        let got = completion.token_ids.get(..safe);
        report.expect(&format!("chat {} greedy", chat["index"]), got == Some(&expected[..safe]), || {
            format!("got {:?}, expected {expected:?}", completion.token_ids)
        });
    }
    Ok(())
}
