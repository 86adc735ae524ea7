//! `trainer bench`: how fast training steps of a model shape are on this machine, and what they are made of.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::{Context, Exit, UsageError, launch, training};
use crate::config::settings::{
    DeviceChoice, OffloadDevice, OffloadSettings, OptimizerKind, Precision, RankBackend, RankSettings, ZeroStage,
};
use crate::engine::{Activations, Order, Parked, Plan};
use crate::model::load::RandomStorage;
use crate::ranks::{self, Ranks};
use crate::rollout::Statistics;
use crate::telemetry::units;
use crate::train::bench::{Bench, Measured, Settings, Work, lora};
use crate::train::bench_rollout::MeasuredRollout;
use crate::train::{self, Backend};
use crate::zero::{Offload, Sharing};

const EXAMPLES: &str = "\
Examples:
  trainer bench configs/bench/qwen2-7b --work 1x2048 --work 4x2048 --work 1x8192
  trainer bench configs/bench/qwen2-7b --work 4x4x128+256          # GRPO: 4 prompts, 4 completions each
  trainer bench configs/bench/qwen2-7b --work 1x2048 --micro-batches 16 --order depth-first --order breadth-first
  trainer bench configs/bench/qwen2-7b --work 4x2048 --activations keep --activations offload --json bench.jsonl
  trainer bench configs/bench/qwen2-7b --rollout 1x1x128+256 --rollout 4x4x128+256   # generation
  trainer bench configs/bench/qwen2-7b --weights q4_k_m --rollout 4x4x128+256        # ... from GGUF types";

/// What becomes of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ActivationsArg {
    /// They stay on the device
    Keep,
    /// They are computed again in backward
    Recompute,
    /// As recompute, with what it starts from and attention's results in host memory
    Offload,
}

impl From<ActivationsArg> for Activations {
    fn from(arg: ActivationsArg) -> Self {
        match arg {
            ActivationsArg::Keep => Self::Keep,
            ActivationsArg::Recompute => Self::Recompute,
            ActivationsArg::Offload => Self::Offload,
        }
    }
}

impl std::fmt::Display for ActivationsArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Keep => "keep",
            Self::Recompute => "recompute",
            Self::Offload => "offload",
        })
    }
}

/// How much of a layer waits in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ParkArg {
    /// As runs do
    Auto,
    /// Its input
    Input,
    /// And attention's results
    Attention,
    /// And the products before attention
    Products,
    /// And an eighth of gate and up
    MlpRows,
}

impl From<ParkArg> for Option<Parked> {
    fn from(arg: ParkArg) -> Self {
        match arg {
            ParkArg::Auto => None,
            ParkArg::Input => Some(Parked::Input),
            ParkArg::Attention => Some(Parked::Attention),
            ParkArg::Products => Some(Parked::Products),
            ParkArg::MlpRows => Some(Parked::MlpRows),
        }
    }
}

/// The order of a step's micro-batches; `None`: that which a run takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderArg(Option<Order>);

impl std::str::FromStr for OrderArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let count = |text: &str| text.strip_prefix("groups-of-")?.parse::<usize>().ok().filter(|&count| count > 0);
        let order = match text {
            "auto" => None,
            "depth-first" => Some(Order::DepthFirst),
            "breadth-first" => Some(Order::BreadthFirst),
            other => Some(Order::Grouped(count(other).ok_or_else(|| {
                format!(
                    "`{other}`: expected `auto`, `depth-first`, `breadth-first` or `groups-of-N`, e.g. `groups-of-2`"
                )
            })?)),
        };
        Ok(Self(order))
    }
}

/// What ranks exchange the memory of GPUs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendArg {
    /// Through host memory
    Gloo,
    /// NCCL
    Nccl,
}

impl Args {
    /// How the ranks share the model's state, and what of it waits in host memory.
    fn ranks(&self) -> RankSettings {
        let elsewhere = if self.nvme_path.is_some() { OffloadDevice::Nvme } else { OffloadDevice::Cpu };
        let place = |waits| if waits { elsewhere } else { OffloadDevice::None };
        let default = RankSettings::default();
        RankSettings {
            world_size: self.num_processes as usize,
            stage: ZeroStage::of_number(usize::from(self.zero_stage)).unwrap_or_default(),
            backend: match self.ddp_backend {
                None => RankBackend::Auto,
                Some(BackendArg::Gloo) => RankBackend::Gloo,
                Some(BackendArg::Nccl) => RankBackend::Nccl,
            },
            offload: OffloadSettings {
                optimizer: place(self.offload_optimizer),
                params: place(self.offload_params),
                max_live_parameters: Some(self.max_live_parameters),
                optimizer_path: self.nvme_path.clone(),
                params_path: self.nvme_path.clone(),
                ..default.offload
            },
            ..default
        }
    }
}

/// Measure training steps of a model of random packed weights, with an adapter on all projections
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A `config.json`, or a folder that holds one; no weights are read
    #[arg(value_name = "MODEL", value_parser = super::path)]
    pub model: PathBuf,

    /// What a step works on: `SEQUENCESxTOKENS`, or `PROMPTSxSAMPLESxPROMPT+COMPLETION`; may be given several times
    #[arg(
        long = "work",
        value_name = "WORK",
        required_unless_present = "rollout",
        value_parser = |text: &str| text.parse::<Work>()
    )]
    pub work: Vec<Work>,

    /// Measure generation: `PROMPTSxSAMPLESxPROMPT+COMPLETION`, every completion at full length; may be given several times
    #[arg(long, value_name = "WORK", value_parser = |text: &str| text.parse::<Work>())]
    pub rollout: Vec<Work>,

    /// Sequences that are generated at a time
    #[arg(long, value_name = "COUNT", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_seqs: u32,

    /// What logits are divided by in a rollout; 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    pub temperature: f64,

    /// What becomes of activations between forward and backward; may be given several times
    #[arg(long = "activations", value_name = "WHAT", value_enum, default_values = ["recompute"])]
    pub activations: Vec<ActivationsArg>,

    /// How much of a layer waits in host memory with `--activations offload`: `auto` is what runs take, the amount with the
    /// least estimated time; may be given several times
    #[arg(long = "park", value_name = "HOW MUCH", value_enum, default_values = ["auto"])]
    pub park: Vec<ParkArg>,

    /// Micro-batches of a step (`gradient_accumulation_steps`)
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub micro_batches: u32,

    /// The order in which they pass through the blocks: `auto` as runs do, `depth-first`, `breadth-first`, or `groups-of-N` at a
    /// time; may be given several times
    #[arg(long = "order", value_name = "ORDER", default_values = ["auto"])]
    pub order: Vec<OrderArg>,

    /// How the random weights are stored: `nf4`, a GGUF type (`q4_0`, `q4_1`, `q5_0`, `q5_1`, `q8_0`, `q2_k` to `q6_k`), `q4_k_m`, the
    /// mix of `q4_k` and `q6_k` of files of that name, or `unlike`, every projection in another type
    #[arg(long, value_name = "TYPE", default_value = "nf4", value_parser = |text: &str| text.parse::<RandomStorage>())]
    pub weights: RandomStorage,

    /// Rank of the adapter
    #[arg(long, value_name = "RANK", default_value_t = 16)]
    pub lora_r: usize,

    /// Steps measured
    #[arg(long, value_name = "STEPS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,

    /// Steps before the clock starts
    #[arg(long, value_name = "STEPS", default_value_t = 3)]
    pub warmup: u32,

    /// Types of activations: `bf16`, `fp16` (f32 residual stream) or `no` (f32)
    #[arg(long, value_name = "TYPE", value_parser = parse_precision)]
    pub precision: Option<Precision>,

    /// Where to compute: `cpu`, `cuda:N`, or `auto`: the first GPU if there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = |text: &str| text.parse::<DeviceChoice>())]
    pub device: DeviceChoice,

    /// Do as with `full_determinism`: the libraries' first choice for each product, fixed orders of sums
    #[arg(long)]
    pub no_tune: bool,

    /// Ranks of the measured run, all on this machine: one process and GPU each
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub num_processes: u32,

    /// What ranks share (stage of ZeRO, 0 to 3)
    #[arg(long, value_name = "STAGE", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..4))]
    pub zero_stage: u8,

    /// What ranks exchange the memory of GPUs with: `nccl`, or `gloo` through host memory, which lets them share a GPU
    #[arg(long, value_name = "BACKEND", value_enum)]
    pub ddp_backend: Option<BackendArg>,

    /// Keep the optimizer's state, gradients and the values that it moves in host memory
    #[arg(long)]
    pub offload_optimizer: bool,

    /// Keep parameters in host memory, from which each block comes while the one before computes
    #[arg(long)]
    pub offload_params: bool,

    /// What the two options above take elsewhere lies in files of this folder instead of host memory
    #[arg(long = "nvme-path", value_name = "FOLDER")]
    pub nvme_path: Option<PathBuf>,

    /// Values of parameters that may be on the GPU at a time where they come from elsewhere; two blocks always may
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub max_live_parameters: usize,

    /// Most memory that a rank takes of its GPU, in GiB
    #[arg(long, value_name = "GIB")]
    pub device_memory_limit: Option<f64>,

    /// Append the results to this file, one JSON object a line
    #[arg(long, value_name = "FILE", value_parser = super::path)]
    pub json: Option<PathBuf>,
}

fn parse_precision(text: &str) -> Result<Precision, String> {
    text.parse().map_err(|()| format!("expected one of {}", Precision::NAMES.join(", ")))
}

/// Measures and prints a table.
///
/// # Errors
/// If the model cannot be made or a step fails.
pub fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let settings = args.ranks();
    let place = training::place().map_err(|error| UsageError(error.to_string()))?;
    let launched = place.filter(|place| place.world_size > 1);
    if launched.is_none() && settings.world_size > 1 {
        return launch::run(settings.world_size);
    }
    if let Some(place) = &launched {
        training::share_cores(place, &training::environment())?;
    }
    let local_rank = launched.as_ref().map_or(0, |place| place.local_rank);
    let ranks = ranks::join(launched, Duration::from_secs(settings.timeout_secs))?;
    let measured = measure(args, context, &settings, (&ranks, local_rank));
    measured.inspect_err(|error| ranks.abandon(&format!("{error:#}")))?;
    ranks.barrier()?;
    Ok(Exit::Done)
}

/// Measures on one rank; the first prints.
fn measure(
    args: &Args,
    context: &Context,
    settings: &RankSettings,
    (ranks, local_rank): (&Arc<dyn Ranks>, usize),
) -> anyhow::Result<()> {
    if args.nvme_path.is_some() && !(args.offload_params || args.offload_optimizer) {
        anyhow::bail!("`--nvme-path` says where something waits: add `--offload-params` or `--offload-optimizer`");
    }
    let print = |text: &str| if ranks.is_first() { context.print(text) } else { Ok(()) };
    let default = if train::has_bf16() { Precision::Bf16 } else { Precision::No };
    let precision = args.precision.unwrap_or(default);
    let backend = Backend::for_bench(args.device, precision, settings.backend, (&**ranks, local_rank))?;
    if let Some(gib) = args.device_memory_limit {
        backend.limit_memory((gib * f64::from(1 << 30)) as u64, train::estimate::context_bytes(settings))?;
    }
    let exchange = backend.exchange(ranks, settings)?;
    let sharing = Sharing::new(Arc::clone(ranks), exchange, settings, OptimizerKind::AdamW);
    let mut run = format!("bench-{}", std::process::id()).into_bytes();
    ranks.broadcast(&mut run, 0)?;
    let offload = Offload::of(settings, &backend.device, backend.types.read(), &String::from_utf8(run)?);
    let world_size = settings.world_size;
    let settings = Settings {
        lora: lora(args.lora_r),
        weights: args.weights,
        warmup: args.warmup as usize,
        steps: args.steps as usize,
        activations: Activations::Recompute,
        micro_batches: args.micro_batches as usize,
        tune: !args.no_tune,
        seed: 42,
        offload,
    };
    let started = std::time::Instant::now();
    let mut bench = Bench::new(&args.model, &backend, sharing, settings)?;
    print(&format!(
        "{}; model of {} parameters in {} made in {}; a large product runs at {:.1} TFLOP/s; LoRA r={}\n",
        backend.describe(),
        units::count(bench.config().num_parameters() as u64),
        args.weights,
        units::duration(started.elapsed().as_secs_f64()),
        bench.peak_flops / 1e12,
        args.lora_r,
    ))?;
    if !backend.device.is_cpu() && !args.work.is_empty() {
        print(&format!("rates: {}\n", bench.rates().describe(world_size)))?;
    }
    for &work in &args.rollout {
        let measured = bench.rollout(work, args.max_num_seqs as usize, args.temperature)?;
        print(&rollout_row(&measured))?;
        if let Some(path) = args.json.as_ref().filter(|_| ranks.is_first()) {
            append(path, &rollout_record(args, &backend, &measured))?;
        }
    }
    for &activations in args.activations.iter().filter(|_| !args.work.is_empty()) {
        bench.set_activations(activations.into());
        print(&format!("activations: {activations}\n"))?;
        // Only offloading parks anything.
        let park = if activations == ActivationsArg::Offload { &args.park[..] } else { &[ParkArg::Auto] };
        let ways = || args.order.iter().flat_map(|order| park.iter().map(move |park| (order, park)));
        for (&work, (&order, &park)) in args.work.iter().flat_map(|work| ways().map(move |way| (work, way))) {
            bench.force_parked(park.into());
            bench.force_order(order.0);
            // A reader that went away is found at the next row.
            let say = |text: &str| print(&format!("{text}\n")).unwrap_or_default();
            let measured = bench.measure(work, &say)?;
            print(&row(&measured))?;
            if let Some(path) = args.json.as_ref().filter(|_| ranks.is_first()) {
                append(path, &record(args, activations, &backend, &bench, &measured))?;
            }
        }
    }
    Ok(())
}

fn row(m: &Measured) -> String {
    let median = m.median_secs();
    let (least, most) =
        m.step_secs.iter().fold((f64::INFINITY, 0.0f64), |(least, most), &s| (least.min(s), most.max(s)));
    let mut text = format!(
        "{:<14} {:>8.0} tokens/s   step {:.4} s ({least:.4} to {most:.4})   {:.0}% of the floor {:.4} s",
        m.work.to_string(),
        m.tokens as f64 / median,
        median,
        100.0 * m.floor_secs / median,
        m.floor_secs,
    );
    if m.peak_bytes > 0 {
        let (peak, device) = (units::bytes(m.peak_bytes), units::bytes(m.device_bytes));
        let _ = write!(text, "   peak {peak}, device {device}");
    }
    if m.host_bytes > 0 {
        let _ = write!(text, "   weights in host memory {}", units::bytes(m.host_bytes));
    }
    if m.micro_batches > 1 {
        let _ = write!(text, "   {} micro-batches, {}", m.micro_batches, m.order);
    }
    if let Some(parked) = m.plan.as_ref().and_then(Plan::parked_name) {
        let _ = write!(text, "   in host memory: {parked}");
    }
    text.push('\n');
    for (what, how) in m.plan.iter().flat_map(Plan::describe) {
        let _ = writeln!(text, "               {what}: {how}");
    }
    if !m.phases.is_empty() {
        let parts: Vec<String> = m.phases.iter().map(|(name, secs)| format!("{name} {:.1}", 1e3 * secs)).collect();
        let _ = writeln!(text, "               ms by phase: {}", parts.join(", "));
    }
    text
}

fn rollout_row(m: &MeasuredRollout) -> String {
    let Statistics { prefill_tokens, decode_tokens, prefill_secs, decode_secs, sampling_secs, steps, .. } =
        m.statistics;
    let mut text = format!(
        "rollout {:<14} {:>8.0} tokens/s decoding   {:.3} s   prefill {:.1} ms ({prefill_tokens} tokens), decode {:.1} ms \
         ({decode_tokens} tokens, {steps} steps), host {:.1} ms   {:.0}% of the floor {:.4} s ({} at {:.2} TB/s)",
        m.work.to_string(),
        m.decode_rate(),
        m.secs(),
        1e3 * prefill_secs,
        1e3 * decode_secs,
        1e3 * sampling_secs,
        100.0 * m.floor_secs() / decode_secs,
        m.floor_secs(),
        units::bytes(m.decode_bytes as u64),
        m.bandwidth / 1e12,
    );
    if !m.is_recorded {
        text.push_str("   step by step");
    }
    if m.peak_bytes > 0 {
        let _ = write!(text, "   peak {}", units::bytes(m.peak_bytes));
    }
    text.push('\n');
    text
}

fn rollout_record(args: &Args, backend: &Backend, m: &MeasuredRollout) -> serde_json::Value {
    let s = m.statistics;
    json!({
        "model": args.model.display().to_string(),
        "device": backend.describe(),
        "commit": option_env!("TRAINER_GIT_COMMIT"),
        "rollout": m.work.to_string(),
        "max_num_seqs": args.max_num_seqs,
        "temperature": args.temperature,
        "weights": args.weights.to_string(),
        "lora_r": args.lora_r,
        "offload_optimizer": args.offload_optimizer,
        "offload_params": args.offload_params,
        "is_recorded": m.is_recorded,
        "rollout_secs": m.rollout_secs,
        "decode_tokens_per_second": m.decode_rate(),
        "prefill_secs": s.prefill_secs,
        "decode_secs": s.decode_secs,
        "sampling_secs": s.sampling_secs,
        "steps": s.steps,
        "preemptions": s.preemptions,
        "decode_bytes": m.decode_bytes,
        "bandwidth": m.bandwidth,
        "floor_secs": m.floor_secs(),
        "peak_bytes": m.peak_bytes,
    })
}

fn record(
    args: &Args,
    activations: ActivationsArg,
    backend: &Backend,
    bench: &Bench,
    m: &Measured,
) -> serde_json::Value {
    let rates = bench.rates();
    json!({
        "model": args.model.display().to_string(),
        "device": backend.describe(),
        "commit": option_env!("TRAINER_GIT_COMMIT"),
        "work": m.work.to_string(),
        "activations": activations.to_string(),
        "micro_batches": m.micro_batches,
        "order": m.order.name(),
        "at_a_time": m.order.at_a_time(m.micro_batches),
        "weights": args.weights.to_string(),
        "lora_r": args.lora_r,
        "ranks": args.num_processes,
        "zero_stage": args.zero_stage,
        "offload_optimizer": args.offload_optimizer,
        "offload_params": args.offload_params,
        "nvme_path": args.nvme_path,
        "max_live_parameters": args.max_live_parameters,
        "host_bytes": m.host_bytes,
        "tokens_per_second": m.tokens as f64 / m.median_secs(),
        "step_secs": m.step_secs,
        "floor_secs": m.floor_secs,
        "peak_flops": bench.peak_flops,
        "parked": m.plan.as_ref().and_then(Plan::parked_name),
        "is_last_layer_whole": m.plan.as_ref().map(Plan::is_last_whole),
        "rates": {
            "products": rates.products,
            "memory": rates.memory,
            "bus": rates.bus,
            "link": rates.link,
            "is_measured": rates.is_measured,
        },
        "peak_bytes": m.peak_bytes,
        "device_bytes": m.device_bytes,
        "phase_secs": m.phases,
    })
}

fn append(path: &std::path::Path, record: &serde_json::Value) -> anyhow::Result<()> {
    use std::io::Write as _;
    let failed = |source| crate::fs::io_error("append to", path)(source);
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).map_err(failed)?;
    writeln!(file, "{record}").map_err(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_are_written() {
        let order = |text: &str| text.parse::<OrderArg>().map(|OrderArg(order)| order);
        assert_eq!(order("auto"), Ok(None));
        assert_eq!(order("depth-first"), Ok(Some(Order::DepthFirst)));
        assert_eq!(order("breadth-first"), Ok(Some(Order::BreadthFirst)));
        assert_eq!(order("groups-of-12"), Ok(Some(Order::Grouped(12))));
        for wrong in ["", "groups-of-0", "groups-of-", "groups-of--1", "groups", "2"] {
            assert!(order(wrong).unwrap_err().contains("groups-of-N"), "{wrong}");
        }
    }
}
