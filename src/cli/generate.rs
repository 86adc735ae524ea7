//! `trainer generate`: completions of prompts, to look at a model or an adapter.

use std::path::PathBuf;

use clap::ArgGroup;
use serde_json::json;

use super::{Context, Exit, UsageError};
use crate::config::settings::{DeviceChoice, ModelSettings, Precision, SamplingSettings, WeightDtype};
use crate::data::{RenderOptions, StreamDecoder};
use crate::engine::Activations;
use crate::model::load::Purpose;
use crate::rollout::forward::EngineModel;
use crate::rollout::{Caller, Event, Request, Rollout, RolloutSettings};
use crate::telemetry::{peak_resident_bytes, units};
use crate::train::session::{self, Session};
use crate::train::{self, Backend};
use crate::zero::{Offload, Sharing};

/// Prompts completed at the same time.
const MOST_SEQUENCES: usize = 16;

const EXAMPLES: &str = "\
Examples:
  trainer generate --model Qwen/Qwen2.5-0.5B-Instruct --prompt 'What is 12 * 7?'
  trainer generate --model model.gguf --prompt 'def fibonacci(n):' --raw --max-new-tokens 64 --stream
  trainer generate --model models/qwen --adapter out/grpo --prompts-file prompts.txt --temperature 0.7 --top-p 0.95";

/// Let a model complete prompts
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES, group(ArgGroup::new("prompts").required(true).args(["prompt", "prompts_file"])))]
pub struct Args {
    /// A model folder, a `.gguf` file or a Hugging Face id
    #[arg(long, value_name = "MODEL", value_parser = super::location)]
    pub model: String,

    /// A folder with a PEFT LoRA adapter for the model
    #[arg(long, value_name = "DIR", value_parser = super::path)]
    pub adapter: Option<PathBuf>,

    /// The prompt
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,

    /// A text file with one prompt per line; empty lines are left out
    #[arg(long, value_name = "FILE", value_parser = super::path)]
    pub prompts_file: Option<PathBuf>,

    /// Put prompts into the model's chat template [default: where the model has one]
    #[arg(long, conflicts_with = "raw")]
    chat: bool,

    /// Give prompts to the model as they are
    #[arg(long)]
    raw: bool,

    /// A system message in front of every prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,

    /// Longest completion in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,

    /// Divides the logits before sampling; 0 takes the likeliest token every time
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0, allow_negative_numbers = true, value_parser = parse_temperature)]
    pub temperature: f64,

    /// Sample from the likeliest tokens that together have this probability, in (0, 1]; 1 is off
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, value_parser = parse_top_p)]
    pub top_p: f64,

    /// Sample from this many of the likeliest tokens; 0 is off
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub top_k: usize,

    /// Seed of the random draws: the same seed gives the same text
    #[arg(long, value_name = "NUMBER", default_value_t = 42)]
    pub seed: u64,

    /// Where to compute: `cpu`, `cuda:N`, or `auto`: the first GPU if there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse_device)]
    pub device: DeviceChoice,

    /// Print a completion while it is written instead of at its end; takes one prompt
    #[arg(long, conflicts_with = "prompts_file")]
    pub stream: bool,
}

/// How a prompt becomes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptForm {
    /// In the chat template if the model has one.
    ChatIfPossible,
    /// In the chat template; a model without one is an error.
    Chat,
    /// As it is.
    Raw,
}

impl Args {
    /// How prompts become tokens. A system message asks for the chat template.
    pub fn prompt_form(&self) -> PromptForm {
        if self.raw {
            PromptForm::Raw
        } else if self.chat || self.system.is_some() {
            PromptForm::Chat
        } else {
            PromptForm::ChatIfPossible
        }
    }

    /// The prompts, from the command line or the file.
    ///
    /// # Errors
    /// If the file cannot be read or holds no prompt.
    pub fn prompts(&self) -> anyhow::Result<Vec<String>> {
        let Some(path) = &self.prompts_file else {
            return Ok(self.prompt.iter().cloned().collect());
        };
        let text = std::fs::read_to_string(path).map_err(crate::fs::io_error("read", path))?;
        let prompts: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(Into::into).collect();
        if prompts.is_empty() {
            anyhow::bail!(UsageError(format!("`{}` holds no prompt; write one per line", path.display())));
        }
        Ok(prompts)
    }
}

fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    text.parse()
}

fn parse_temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a number of at least 0, e.g. 0.7".into()),
    }
}

fn parse_top_p(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("expected a share above 0 and at most 1, e.g. 0.95".into()),
    }
}

/// Generates.
///
/// # Errors
/// If the model cannot be loaded or a prompt cannot be completed.
pub fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let prompts = args.prompts()?;
    let mut progress = train::downloads(&context.terminal);
    let (session, ()) = session::open(
        &args.model_settings(),
        args.seed,
        Purpose::Inference,
        (Activations::Keep, 0),
        &Backend::open(args.device, args.precision())?,
        (Sharing::alone(), Offload::default()),
        (&mut progress, |_, _| Ok(())),
    )?;
    drop(progress);
    let requests = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| args.request(index, prompt, &session))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let (longest, room) =
        (requests.iter().map(|r| r.prompt_ids.len()).max(), session.engine.config().max_position_embeddings);
    if longest.is_some_and(|tokens| tokens + args.max_new_tokens as usize > room) {
        tracing::info!(
            "the model holds {room} tokens: the completion of the longest prompt ends there, before --max-new-tokens"
        );
    }
    let mut rollout = Rollout::new(RolloutSettings {
        max_num_seqs: MOST_SEQUENCES,
        max_batch_tokens: RolloutSettings::DEFAULT_BATCH_TOKENS,
        kv_cache_bytes: usize::MAX,
        max_new_tokens: args.max_new_tokens as usize,
        eos_token_ids: session.tokenizer.eos_ids().to_vec(),
    })?;
    let sampling = SamplingSettings {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        ..SamplingSettings::default()
    };
    let mut stream = StreamDecoder::new(true);
    let mut trouble = None;
    let mut on_event = |event: Event| {
        if let (true, Event::Token { token, .. }) = (args.stream, event) {
            let printed =
                stream.push(&session.tokenizer, token).map_err(Into::into).and_then(|text| context.print(&text));
            trouble = trouble.take().or(printed.err());
        }
    };
    let mut caller = Caller { on_event: &mut on_event, is_cancelled: &|| false, detokenize: None };
    let mut model = EngineModel::new(&session.engine, true)?.recorded()?;
    let completions = rollout.generate(&mut model, &requests, &sampling, args.seed, 0, &mut caller)?;
    if let Some(error) = trouble {
        return Err(error);
    }
    if args.stream {
        context.print(&format!("{}\n", stream.finish()))?;
    } else {
        for (prompt, completion) in prompts.iter().zip(&completions) {
            let text = session.tokenizer.decode(&completion.token_ids, true)?;
            // Several completions are told apart by their prompts; one alone is printed as it is.
            let heading = if prompts.len() > 1 { format!("### {prompt}\n") } else { String::new() };
            context.print(&format!("{heading}{text}\n"))?;
        }
    }
    let statistics = rollout.statistics();
    tracing::info!(
        "prefill {} tokens at {:.1} tokens/s, decode {} tokens at {:.1} tokens/s, peak memory {}",
        statistics.prefill_tokens,
        statistics.prefill_tokens as f64 / statistics.prefill_secs,
        statistics.decode_tokens,
        statistics.decode_tokens as f64 / (statistics.decode_secs + statistics.sampling_secs),
        peak_resident_bytes().map_or_else(|| "unknown".into(), units::bytes)
    );
    Ok(Exit::Done)
}

impl Args {
    /// 16 bits on a GPU; the CPU computes in f32.
    fn precision(&self) -> Precision {
        match self.device {
            DeviceChoice::Cpu => Precision::No,
            _ if train::has_bf16() => Precision::Bf16,
            DeviceChoice::Auto if !train::has_gpu(0) => Precision::No,
            _ => Precision::Fp16,
        }
    }

    fn model_settings(&self) -> ModelSettings {
        ModelSettings {
            model_name_or_path: self.model.clone(),
            model_revision: "main".into(),
            tokenizer_name_or_path: None,
            chat_template: None,
            chat_template_path: None,
            eos_token: None,
            init_random: false,
            dtype: WeightDtype::Auto,
            quantization: None,
            lora: None,
            adapter_name_or_path: self.adapter.clone(),
        }
    }

    /// The tokens of a prompt, in the chat template where that is asked for and possible.
    fn request(&self, index: usize, prompt: &str, session: &Session) -> anyhow::Result<Request> {
        let template = match (self.prompt_form(), &session.template) {
            (PromptForm::Raw, _) | (PromptForm::ChatIfPossible, None) => None,
            (PromptForm::Chat, None) => {
                anyhow::bail!(UsageError(format!(
                    "`{}` has no chat template; leave out --chat and --system",
                    self.model
                )))
            }
            (_, template) => template.as_ref(),
        };
        let text = match template {
            None => prompt.to_string(),
            Some(template) => {
                let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
                let messages: Vec<_> = system.chain([json!({"role": "user", "content": prompt})]).collect();
                let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
                template.render(&messages.into(), options)?
            }
        };
        let prompt_ids = session.tokenizer.encode(&text)?;
        Ok(Request { sample_id: index as u64, prompt_ids, group: index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(arguments: &[&str]) -> Result<Args, String> {
        let all = ["trainer", "--model", "m"].iter().chain(arguments);
        Cli::try_parse_from(all).map(|cli| cli.args).map_err(|error| error.to_string())
    }

    #[test]
    fn one_source_of_prompts_is_required_and_contradictions_are_refused() {
        let cases: [(&[&str], &str); 8] = [
            (&[], "required"),
            (&["--prompt", "x", "--prompts-file", "y"], "cannot be used with"),
            (&["--prompt", "x", "--chat", "--raw"], "cannot be used with"),
            (&["--prompt", "x", "--system", "s", "--raw"], "cannot be used with"),
            (&["--prompts-file", "y", "--stream"], "cannot be used with"),
            (&["--prompt", "x", "--temperature", "-1"], "at least 0"),
            (&["--prompt", "x", "--top-p", "0"], "above 0"),
            (&["--prompt", "x", "--max-new-tokens", "0"], "0 is not in"),
        ];
        for (arguments, expected) in cases {
            let message = parse(arguments).unwrap_err();
            assert!(message.contains(expected), "{arguments:?}: {message}");
        }
    }

    #[test]
    fn the_form_follows_the_flags() {
        let form = |arguments: &[&str]| parse(&[&["--prompt", "x"], arguments].concat()).unwrap().prompt_form();
        assert_eq!(form(&[]), PromptForm::ChatIfPossible);
        assert_eq!(form(&["--chat"]), PromptForm::Chat);
        assert_eq!(form(&["--system", "s"]), PromptForm::Chat);
        assert_eq!(form(&["--raw"]), PromptForm::Raw);
    }

    #[test]
    fn prompts_come_from_the_line_or_the_file() {
        assert_eq!(parse(&["--prompt", "a\nb"]).unwrap().prompts().unwrap(), ["a\nb"]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            parse(&["--prompts-file", path.to_str().unwrap()]).unwrap().prompts()
        };
        assert_eq!(read("one\n\n two\r\n").unwrap(), ["one", " two"]);
        assert!(read(" \n").unwrap_err().to_string().contains("holds no prompt"));
        std::fs::remove_file(&path).unwrap();
        let missing = parse(&["--prompts-file", path.to_str().unwrap()]).unwrap().prompts().unwrap_err();
        assert!(missing.to_string().contains("cannot read"), "{missing}");
    }
}
