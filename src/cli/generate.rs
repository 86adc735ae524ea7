//! `trainer generate`: completions of prompts, and conversations, to look at a model or an adapter.

mod chat;
mod output;
mod prompts;

use std::path::PathBuf;

use clap::ArgGroup;

use self::prompts::Prompts;
use super::{Context, Exit, UsageError};
use crate::config::settings::{
    DeviceChoice, ModelSettings, Precision, QuantType, Quantization, SamplingSettings, WeightDtype,
};
use crate::data::StreamDecoder;
use crate::engine::Activations;
use crate::model::load::Purpose;
use crate::model::source::{Kept, StoredSizes};
use crate::rollout::forward::EngineModel;
use crate::rollout::{Caller, Completion, Event, Request, Rollout, RolloutSettings, Statistics};
use crate::telemetry::{Console, peak_resident_bytes, units};
use crate::train::session::{self, Session, Text};
use crate::train::{self, Backend};
use crate::zero::{Offload, Sharing};

const EXAMPLES: &str = "\
Examples:
  trainer generate --model Qwen/Qwen2.5-0.5B-Instruct --prompt 'What is 12 * 7?'
  trainer generate --model model.gguf --prompt 'def fibonacci(n):' --raw --max-new-tokens 64 --stream
  trainer generate --model models/qwen --adapter out/grpo --prompts-file prompts.txt --temperature 0.7 --top-p 0.95

  # Rows with `prompt` or `messages`, four completions of each, all columns kept
  trainer generate --model models/qwen --prompts-file rows.jsonl --output out.jsonl --num-return-sequences 4 --temperature 1

  # A conversation with the adapter of a run on 4-bit weights
  trainer generate --model models/qwen --load-in-4bit --adapter out/grpo --interactive";

/// Let a model complete prompts
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES, group(ArgGroup::new("prompts").required(true).args(["prompt", "prompts_file", "interactive"])))]
#[expect(clippy::struct_excessive_bools, reason = "one field a flag")]
pub struct Args {
    /// A model folder, a `.gguf` file or a Hugging Face id
    #[arg(long, value_name = "MODEL", value_parser = super::location)]
    pub model: String,

    /// A folder with a PEFT LoRA adapter for the model
    #[arg(long, value_name = "DIR", value_parser = super::path)]
    pub adapter: Option<PathBuf>,

    /// Quantise the linear weights of the decoder layers to 4 bits while loading, as `load_in_4bit` of a run does; tensors that
    /// are stored packed (GGUF blocks, 4 bits) stay as they are
    #[arg(long)]
    pub load_in_4bit: bool,

    /// Code book of --load-in-4bit: `nf4` or `fp4`
    #[arg(long, value_name = "TYPE", default_value = "nf4", requires = "load_in_4bit", value_parser = parse_quant_type)]
    pub bnb_4bit_quant_type: QuantType,

    /// Quantise the block maxima of --load-in-4bit as well
    #[arg(long, alias = "bnb-4bit-use-double-quant", requires = "load_in_4bit")]
    pub use_bnb_nested_quant: bool,

    /// The prompt
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,

    /// A file of prompts: `.jsonl` with an object per line that has `prompt` (a text or a list of messages) or else `messages`, and
    /// other columns; any other file with a text per line. Empty lines are left out
    #[arg(long, value_name = "FILE", value_parser = super::path)]
    pub prompts_file: Option<PathBuf>,

    /// A conversation: each line of standard input is a message, answered while the answer is drawn; `/reset` begins a new
    /// conversation, `/exit` or the end of the input ends it
    #[arg(long, conflicts_with_all = ["raw", "output"])]
    pub interactive: bool,

    /// Write completions to this file, an object per line: the prompt's columns, `completion`, `completion_tokens` (with the token
    /// that ended it) and `finish_reason` (`stop` or `length`) [default: to the console, as such lines if the prompts are]
    #[arg(long, value_name = "FILE", value_parser = super::path)]
    pub output: Option<PathBuf>,

    /// Completions of each prompt; more than one need a temperature above 0
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub num_return_sequences: u32,

    /// Completions that are generated at a time; they change speed and memory alone
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_seqs: u32,

    /// Put prompts into the model's chat template [default: where the model has one]
    #[arg(long, conflicts_with = "raw")]
    chat: bool,

    /// Give prompts to the model as they are
    #[arg(long)]
    raw: bool,

    /// A system message in front of every prompt that has none
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
    /// How prompts become tokens. A system message and a conversation ask for the chat template.
    pub fn prompt_form(&self) -> PromptForm {
        if self.raw {
            PromptForm::Raw
        } else if self.chat || self.interactive || self.system.is_some() {
            PromptForm::Chat
        } else {
            PromptForm::ChatIfPossible
        }
    }

    /// What only several values together say, found before anything is read.
    ///
    /// # Errors
    /// If they make no sense together, or the file for completions cannot be written.
    fn check(&self) -> anyhow::Result<()> {
        let count = self.num_return_sequences;
        if count > 1 {
            let problem = if self.interactive {
                Some(
                    "a conversation goes on with one answer; leave one of --num-return-sequences and --interactive out",
                )
            } else if self.stream {
                Some("--stream prints one completion; leave one of --num-return-sequences and --stream out")
            } else if self.temperature == 0.0 {
                Some("at --temperature 0 all would be the same; give a temperature above 0, e.g. 1")
            } else {
                None
            };
            if let Some(problem) = problem {
                anyhow::bail!(UsageError(format!("`--num-return-sequences {count}`: {problem}")));
            }
        }
        match &self.output {
            Some(path) => output::check(path, self.prompts_file.as_deref()),
            None => Ok(()),
        }
    }

    /// The prompts, from the command line or the file; of a conversation there are none yet.
    fn prompts(&self) -> anyhow::Result<Option<Prompts>> {
        match (&self.prompts_file, &self.prompt) {
            (Some(path), _) => Prompts::read(path).map(Some),
            (None, prompt) => Ok(prompt.as_ref().map(|prompt| Prompts::given("--prompt", prompt.as_str().into()))),
        }
    }

    fn tokens(&self, prompts: &Prompts, text: Text<'_>) -> anyhow::Result<Vec<Vec<u32>>> {
        prompts.tokens((self.prompt_form(), self.system.as_deref()), &self.model, text)
    }
}

fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    text.parse()
}

fn parse_quant_type(text: &str) -> Result<QuantType, String> {
    text.parse().map_err(|()| format!("expected one of {}", QuantType::NAMES.join(", ")))
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
    args.check()?;
    let prompts = args.prompts()?;
    let mut progress = train::downloads(&context.terminal);
    let (session, tokens) = session::open(
        &args.model_settings(),
        args.seed,
        Purpose::Inference,
        (Activations::Keep, 0),
        &Backend::open(args.device, args.precision())?,
        (Sharing::alone(), Offload::default()),
        (&mut progress, |text, _| match &prompts {
            Some(prompts) => args.tokens(prompts, text),
            // A conversation needs the chat template from its first turn on.
            None => args.tokens(&Prompts::given("--interactive", "x".into()), text),
        }),
    )?;
    drop(progress);
    args.warn_of_packed(&session)?;
    match prompts {
        None => chat::run(args, &session, context)?,
        Some(prompts) => complete(args, &session, &prompts, tokens, context)?,
    }
    Ok(Exit::Done)
}

/// Completes all prompts and prints or writes the completions.
fn complete(
    args: &Args,
    session: &Session,
    prompts: &Prompts,
    tokens: Vec<Vec<u32>>,
    context: &Context,
) -> anyhow::Result<()> {
    let room = session.engine.config().max_position_embeddings;
    if let Some(index) = tokens.iter().position(|prompt_ids| prompt_ids.len() >= room) {
        anyhow::bail!(
            "{}: the prompt has {} tokens, the model can hold {room} with the completion; shorten the prompt",
            prompts.place(index),
            tokens[index].len()
        );
    }
    let longest = tokens.iter().map(Vec::len).max();
    if longest.is_some_and(|tokens| tokens + args.max_new_tokens as usize > room) {
        tracing::info!(
            "the model holds {room} tokens: the completion of the longest prompt ends there, before --max-new-tokens"
        );
    }
    let samples = args.num_return_sequences as usize;
    let request = |(group, prompt_ids): (usize, Vec<u32>)| {
        (0..samples).map(move |sample| {
            let sample_id = (group * samples + sample) as u64;
            Request { sample_id, prompt_ids: prompt_ids.clone(), group }
        })
    };
    let requests: Vec<Request> = tokens.into_iter().enumerate().flat_map(request).collect();
    let mut rollout = args.rollout(session)?;
    let mut stream = StreamDecoder::new(true);
    let mut trouble = None;
    let console = Console::new(context.terminal.clone(), false);
    let bar = (!args.stream && requests.len() > 1)
        .then(|| console.progress("generate", requests.len() as u64, "completions"));
    let (mut finished, mut drawn) = (0, 0);
    let mut on_event = |event: Event| match event {
        Event::Token { token, .. } => {
            drawn += 1;
            if args.stream {
                let printed =
                    stream.push(&session.tokenizer, token).map_err(Into::into).and_then(|text| context.print(&text));
                trouble = trouble.take().or(printed.err());
            }
        }
        Event::Finished { .. } => finished += 1,
        Event::Step { .. } => {
            if let Some(bar) = &bar {
                bar.set(finished, drawn);
            }
        }
    };
    let mut caller = Caller { on_event: &mut on_event, is_cancelled: &|| false, detokenize: None };
    let mut model = EngineModel::new(&session.engine, true)?.recorded()?;
    let completions = rollout.generate(&mut model, &requests, &args.sampling(), args.seed, 0, &mut caller)?;
    drop(bar);
    if let Some(error) = trouble {
        return Err(error);
    }
    if args.stream {
        context.print(&format!("{}\n", stream.finish()))?;
    }
    let texts: Vec<String> = completions
        .iter()
        .map(|completion| session.tokenizer.decode(&completion.token_ids, true))
        .collect::<Result<_, _>>()?;
    args.show(prompts, &completions, &texts, context)?;
    report(rollout.statistics());
    Ok(())
}

/// Says how fast it was and what memory it took.
fn report(statistics: Statistics) {
    tracing::info!(
        "prefill {} tokens at {:.1} tokens/s, decode {} tokens at {:.1} tokens/s, peak memory {}",
        statistics.prefill_tokens,
        statistics.prefill_tokens as f64 / statistics.prefill_secs,
        statistics.decode_tokens,
        statistics.decode_tokens as f64 / (statistics.decode_secs + statistics.sampling_secs),
        peak_resident_bytes().map_or_else(|| "unknown".into(), units::bytes)
    );
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
            quantization: self.load_in_4bit.then_some(Quantization {
                quant_type: self.bnb_4bit_quant_type,
                double_quant: self.use_bnb_nested_quant,
            }),
            lora: None,
            adapter_name_or_path: self.adapter.clone(),
        }
    }

    fn rollout(&self, session: &Session) -> anyhow::Result<Rollout> {
        let max_num_seqs = self.max_num_seqs as usize;
        Ok(Rollout::new(RolloutSettings {
            max_num_seqs,
            max_batch_tokens: RolloutSettings::batch_tokens(session.engine.device()).max(max_num_seqs),
            kv_cache_bytes: usize::MAX,
            max_new_tokens: self.max_new_tokens as usize,
            eos_token_ids: session.tokenizer.eos_ids().to_vec(),
        })?)
    }

    fn sampling(&self) -> SamplingSettings {
        SamplingSettings {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            ..SamplingSettings::default()
        }
    }

    /// Says that `--load-in-4bit` leaves weights as they are that are stored packed.
    fn warn_of_packed(&self, session: &Session) -> anyhow::Result<()> {
        if !self.load_in_4bit {
            return Ok(());
        }
        let stored = match StoredSizes::read(&session.folder, false)?.1.projections() {
            Some(Kept::Blocks) => "in blocks of GGUF",
            Some(Kept::Codes) => "in 4 bits already",
            Some(Kept::Dense(_)) | None => return Ok(()),
        };
        tracing::warn!(
            "`--load-in-4bit` has no effect on weights of `{}`: they are stored {stored} and stay as they are stored",
            self.model
        );
        Ok(())
    }

    /// Writes the completions to the file, or prints what the console has not got yet.
    fn show(
        &self,
        prompts: &Prompts,
        completions: &[Completion],
        texts: &[String],
        context: &Context,
    ) -> anyhow::Result<()> {
        let all = || completions.iter().zip(texts);
        let lines = || all().map(|(of, text)| output::line(&prompts.object(of.group), text, of)).collect::<String>();
        if let Some(path) = &self.output {
            return Ok(crate::fs::write_atomic(path, lines().as_bytes())?);
        }
        if prompts.are_objects() {
            return context.print(&lines());
        }
        if self.stream {
            return Ok(());
        }
        for (completion, text) in all() {
            // Several completions are told apart by their prompts; one alone is printed as it is.
            let heading =
                if completions.len() > 1 { format!("### {}\n", prompts.text(completion.group)) } else { String::new() };
            context.print(&format!("{heading}{text}\n"))?;
        }
        Ok(())
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
        let cases: [(&[&str], &str); 16] = [
            (&[], "required"),
            (&["--prompt", "x", "--interactive"], "cannot be used with"),
            (&["--prompts-file", "y", "--interactive"], "cannot be used with"),
            (&["--interactive", "--raw"], "cannot be used with"),
            (&["--interactive", "--output", "z"], "cannot be used with"),
            (&["--prompt", "x", "--use-bnb-nested-quant"], "--load-in-4bit"),
            (&["--prompt", "x", "--bnb-4bit-quant-type", "fp4"], "--load-in-4bit"),
            (&["--prompt", "x", "--load-in-4bit", "--bnb-4bit-quant-type", "int4"], "expected one of nf4, fp4"),
            (&["--prompt", "x", "--num-return-sequences", "0"], "0 is not in"),
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
        assert_eq!(parse(&["--interactive"]).unwrap().prompt_form(), PromptForm::Chat);
    }

    #[test]
    fn prompts_come_from_the_line_or_the_file_and_a_conversation_has_none() {
        let given = parse(&["--prompt", "a\nb"]).unwrap().prompts().unwrap().unwrap();
        assert_eq!((given.text(0), given.are_objects()), ("a\nb", false));
        assert_eq!(given.object(0), r#"{"prompt":"a\nb"}"#);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        let read = parse(&["--prompts-file", path.to_str().unwrap()]).unwrap().prompts().unwrap().unwrap();
        assert_eq!((read.text(0), read.text(1)), ("one", "two"));
        assert!(parse(&["--interactive"]).unwrap().prompts().unwrap().is_none());
    }

    #[test]
    fn what_several_flags_say_together_is_checked_before_anything_is_read() {
        let check = |arguments: &[&str]| parse(arguments).unwrap().check().map_err(|error| error.to_string());
        let four = ["--num-return-sequences", "4", "--temperature", "1"];
        check(&[&["--prompt", "x"], &four[..]].concat()).unwrap();
        for (arguments, expected) in [
            (&["--interactive"][..], "a conversation goes on with one answer"),
            (&["--prompt", "x", "--stream"], "--stream prints one completion"),
            (&["--prompt", "x", "--temperature", "0"], "all would be the same"),
        ] {
            let message = check(&[&four[..2], arguments].concat()).unwrap_err();
            assert!(message.contains("`--num-return-sequences 4`") && message.contains(expected), "{message}");
            check(arguments).unwrap();
        }
    }

    #[test]
    fn weights_are_packed_as_the_flags_say() {
        let packed = |arguments: &[&str]| {
            let quantization = parse(&[&["--prompt", "x"], arguments].concat()).unwrap().model_settings().quantization;
            quantization.map(|quantization| (quantization.quant_type, quantization.double_quant))
        };
        assert_eq!(packed(&[]), None);
        assert_eq!(packed(&["--load-in-4bit"]), Some((QuantType::Nf4, false)));
        let both = ["--load-in-4bit", "--bnb-4bit-quant-type", "fp4", "--use-bnb-nested-quant"];
        assert_eq!(packed(&both), Some((QuantType::Fp4, true)));
        assert_eq!(packed(&["--load-in-4bit", "--bnb-4bit-use-double-quant"]), Some((QuantType::Nf4, true)));
    }
}
