//! The sections that a run opens with, and checks that both loops make in each step.

use std::path::Path;

use anyhow::bail;

use super::Backend;
use super::estimate::Work;
use super::run::Run;
use super::session::Session;
use crate::checkpoint;
use crate::config::settings::{
    DataSettings, Interval, LrSchedulerType, ModelSettings, TrainingSettings, Warmup, ZeroStage,
};
use crate::data::hub::Download;
use crate::data::{Epoch, Part, TokenStatistics};
use crate::device;
use crate::model::batch::Batch;
use crate::model::peft::AdapterSpec;
use crate::optim::{LossScaler, LossScalerSettings, LrSchedule};
use crate::telemetry::{Allocation, Console, Kind, Ledger, Progress, Section, Terminal, units};
use crate::zero::{FlatBlock, ShardedOptimizer, Sharing, StepReport};

/// A progress bar for downloads, made when the first one starts.
pub fn downloads(terminal: &Terminal) -> impl FnMut(Download<'_>) + use<> {
    let console = Console::new(terminal.clone(), false);
    let mut bar: Option<(String, Progress)> = None;
    move |download| {
        if bar.as_ref().is_none_or(|(file, _)| file != download.file) {
            console.note(&format!("downloading {} ({})", download.file, units::bytes(download.total_bytes)));
            bar = Some((download.file.into(), console.progress("download", download.total_bytes, "bytes")));
        }
        if let Some((_, bar)) = &bar {
            bar.set(download.done_bytes, 0);
        }
    }
}

/// The key that asks for evaluation, if one does.
pub(super) fn evaluation_key(training: &TrainingSettings) -> Option<&'static str> {
    match training.eval_strategy {
        Interval::No => training.eval_on_start.then_some("eval_on_start"),
        _ => Some("eval_strategy"),
    }
}

/// The learning-rate schedule over `total` optimizer steps.
pub(super) fn schedule(training: &TrainingSettings, total: u64) -> anyhow::Result<LrSchedule> {
    let warmup = match training.warmup {
        Warmup::Steps(steps) => steps,
        Warmup::Ratio(ratio) => (ratio * total as f64).ceil() as usize,
    };
    let kind = training.lr_scheduler_type;
    if kind == LrSchedulerType::Constant && warmup > 0 {
        tracing::warn!("`lr_scheduler_type: constant` has no warm-up; use `constant_with_warmup` to warm up");
    }
    Ok(LrSchedule::new(kind, training.learning_rate, warmup, total as usize, &training.lr_scheduler_kwargs)?)
}

/// Stops the run when the loss is not a number, and says where that began.
pub(super) fn check_loss(
    loss: f64,
    step: u64,
    session: &Session,
    batch: &Batch,
    output_dir: &Path,
) -> anyhow::Result<()> {
    if loss.is_finite() {
        return Ok(());
    }
    let store = session.engine.store();
    // Values that a lost rank did not send come to nothing that is its own fault.
    store.sharing().check_exchange()?;
    // Blocks that ranks gather together are not there for one of them.
    let can_look = store.holds_all_of(crate::engine::Speaker::Policy) || store.sharing().world_size() == 1;
    let found = can_look.then(|| session.engine.first_non_finite(batch)).transpose()?;
    let place = match found {
        None => {
            "where it began is not looked for where ranks share parameters (`zero_stage: 3`, `offload_param_device`)"
                .into()
        }
        Some(Some(block)) => format!("the first values that are not finite come from {block}"),
        Some(None) => "all blocks compute finite values, so it comes from the loss itself".into(),
    };
    let kept = match checkpoint::newest_step(output_dir) {
        Some(saved) => format!("`{}` is untouched", output_dir.join(format!("checkpoint-{saved}")).display()),
        None => "nothing was saved so far".into(),
    };
    bail!(
        "the loss of step {step} is {loss}: {place}. Lower `learning_rate` or `max_grad_norm`, or look at the rows of this \
         batch; {kept}"
    )
}

/// The loss scaler of an fp16 run, by DeepSpeed's rules and defaults; other runs need none.
pub(super) fn loss_scaler(backend: &Backend) -> anyhow::Result<Option<LossScaler>> {
    let scaler = backend.needs_loss_scaling().then(|| LossScaler::dynamic(LossScalerSettings::default()));
    Ok(scaler.transpose()?)
}

/// Factor on the gradients of a step.
pub(super) fn loss_scale(scaler: Option<&LossScaler>) -> f64 {
    scaler.map_or(1.0, LossScaler::scale)
}

/// Stops the run when gradients are not finite; the parameters are as before the step. With a loss scaler such a step is
/// left out and the scale lowered.
pub(super) fn check_step(
    report: StepReport,
    step: u64,
    scaler: Option<&mut LossScaler>,
    run: &mut Run<'_>,
) -> anyhow::Result<()> {
    if let Some(scaler) = scaler {
        scaler.update(report.is_skipped)?;
        run.accumulator.latest("loss_scale", scaler.scale());
        if report.is_skipped {
            let scale = scaler.scale();
            run.console.note(&format!("step {step} left out: gradients outgrew fp16; the loss scale is now {scale}"));
        }
        return Ok(());
    }
    if report.is_skipped {
        bail!(
            "the gradients of step {step} are not finite (norm {}); no parameter was changed. Lower `learning_rate`, or \
             look at the rows of this batch",
            report.grad_norm
        );
    }
    Ok(())
}

/// What the run does and how long.
pub(super) fn run_section(
    task: &str,
    training: &TrainingSettings,
    session: &Session,
    (epoch, total): (Epoch, u64),
    batch: &str,
) -> Section {
    let sharing = session.engine.store().sharing();
    let clip = match training.max_grad_norm {
        0.0 => "no clipping".to_string(),
        norm => format!("clipped at norm {norm}"),
    };
    let mut section = Section::new("Run")
        .row("task", task)
        .row("output", training.output_dir.display())
        .row("device", session.backend().describe())
        .row("ranks", describe_ranks(sharing));
    if let Some(note) = &session.stage_note {
        section.push("ZeRO stage", note);
    }
    section
        .row("steps", format!("{total}, {} an epoch", epoch.steps()))
        .row("batch", batch)
        .row(
            "optimizer",
            format!(
                "{}, learning rate {:e} ({}), {clip}",
                training.optimizer.kind.name(),
                training.learning_rate,
                training.lr_scheduler_type
            ),
        )
        .row("seed", training.seed)
}

/// How many ranks there are and what they share.
fn describe_ranks(sharing: &Sharing) -> String {
    let what = match sharing.stage() {
        _ if sharing.world_size() == 1 => return "1".into(),
        ZeroStage::Replicated => "each with everything",
        ZeroStage::Optimizer => "sharing the optimizer's state",
        ZeroStage::Gradients => "sharing gradients and the optimizer's state",
        ZeroStage::Parameters => "sharing parameters, gradients and the optimizer's state",
    };
    format!("{}, {what} (ZeRO stage {})", sharing.world_size(), sharing.stage().number())
}

/// The model, its storage and what is trained.
pub(super) fn model_section(settings: &ModelSettings, session: &Session) -> Section {
    let config = session.engine.config();
    let store = session.engine.store();
    let trained = store.num_trainable();
    let kind = store.kind_of(1, "model.layers.0.mlp.up_proj.weight").unwrap_or_default();
    let mut section = Section::new("Model")
        .row("base", &settings.model_name_or_path)
        .row(
            "shape",
            format!(
                "{} layers, hidden {}, {} heads ({} kv), vocabulary {}",
                config.num_hidden_layers,
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.vocab_size
            ),
        )
        .row("parameters", units::count(config.num_parameters() as u64))
        .row("linear weights", kind);
    match &session.adapter_spec {
        Some(AdapterSpec { config, .. }) => {
            let kind = if config.use_dora { "DoRA" } else { "LoRA" };
            section.push(
                "adapter",
                format!("{kind} r={} alpha={} on {}", config.r, config.lora_alpha, config.target_modules),
            );
            if !config.modules_to_save.is_empty() {
                section.push("trained whole", whole_modules(session, &config.modules_to_save));
            }
        }
        None => section.push("adapter", "none: all weights are trained"),
    }
    if let Some(note) = &session.end_of_turn {
        section.push("end of turn", note);
    }
    let share = 100.0 * trained as f64 / config.num_parameters() as f64;
    section.row("trained", format!("{} ({share:.2}%)", units::count(trained as u64)))
}

/// What becomes of the activations of a micro-batch as long as those of `work`, half by half, and by which rates that follows.
pub(super) fn activations_section(session: &Session, work: Work) -> Section {
    let engine = &session.engine;
    // Where blocks come for a visit, a step's order may take several micro-batches at a time.
    let plan = engine.plan(work.batch(), engine.store().holds_all());
    let mut section =
        Section::new("Activations").row("for", format!("a micro-batch of {} tokens", units::count(work.tokens as u64)));
    for (what, text) in plan.describe() {
        section.push(what, text);
    }
    if engine.device().is_cuda() {
        section.push("rates", engine.rates().describe(engine.store().sharing().world_size()));
    }
    section
}

/// What is trained whole beside an adapter: `names` of modules, and how many weights that makes.
fn whole_modules(session: &Session, names: &[String]) -> String {
    let entries = session.engine.store().flats().flat_map(FlatBlock::entries);
    let whole: Vec<usize> = entries.filter(|e| !e.name.contains(".lora_")).map(|e| e.range.len()).collect();
    let values = units::count(whole.iter().sum::<usize>() as u64);
    format!("{}: {} tensors, {values} weights", names.join(", "), whole.len())
}

/// The data and its token counts.
pub(super) fn data_section(settings: &DataSettings, parts: &[Part], statistics: &TokenStatistics) -> Section {
    let mut section = Section::new("Data");
    if settings.mixture.is_none() {
        section.push("set", &settings.dataset_name);
    }
    if let Some(folder) = &settings.preprocessed {
        section.push("preprocessed", folder.display());
    }
    for Part { name, taken, available } in parts {
        let (taken, available) = (units::count(*taken as u64), units::count(*available as u64));
        section.push("set", format!("{name}: {taken} of {available} rows"));
    }
    section.row("rows", units::count(statistics.count as u64)).row(
        "tokens",
        format!(
            "{} in all; per row mean {:.1}, median {}, 95% below {}, longest {}",
            units::count(statistics.total as u64),
            statistics.mean,
            statistics.median,
            statistics.p95,
            statistics.max
        ),
    )
}

/// What lies in this rank's files, and the memory that it passes through.
fn describe_files(session: &Session, optimizer: &ShardedOptimizer) -> Vec<String> {
    let store = session.engine.store();
    let files = store.files();
    let place = |(path, bytes): (&Path, u64)| format!("{} in `{}`", units::bytes(bytes), path.display());
    let mut texts: Vec<String> = files.into_iter().map(place).collect();
    if !texts.is_empty() {
        let count = store.offload().files.buffer_count;
        let [visit, step] = [store.largest_read_bytes(), optimizer.largest_read_bytes()];
        let largest = units::bytes(visit.max(step) as u64);
        let most = if count == 1 { "one block".into() } else { format!("{count} blocks") };
        texts.push(format!("at most {most} of each in host memory at a time, a block up to {largest}"));
    }
    texts
}

/// The run's ledger with what lives as long as the run, and the rollout's cache, which grows when it is first used.
pub(super) struct Memory {
    ledger: Ledger,
    kv_cache: Allocation,
    /// In host memory beside a GPU: of weights, of values with gradients, and of the optimizer's state.
    on_host: Option<[u64; 3]>,
    /// What lies in files, for people.
    in_files: Vec<String>,
    _held: Vec<Allocation>,
}

impl Memory {
    /// Registers the session's parameters, the gradients of steps of so many micro-batches, and the optimizer's state;
    /// `kv_cache_bytes` is what the rollout would take if the device had room for it.
    pub(super) fn new(
        session: &Session,
        optimizer: &ShardedOptimizer,
        micro_steps: usize,
        kv_cache_bytes: u64,
    ) -> Self {
        let store = session.engine.store();
        let state = optimizer.size_bytes() as u64;
        let is_beside = store.device().is_cuda() && (store.offload().params || store.offload().optimizer);
        // A reference lies where the values do.
        let copies = if store.has_reference() { 2 } else { 1 };
        let kept = (4 * copies * store.num_kept() + store.gradient_bytes() + store.packed_bytes()) as u64;
        let in_file = optimizer.bytes_in_file() as u64;
        let [host_values, host_state] =
            if store.offload().optimizer && is_beside { [kept, state - in_file] } else { [0, 0] };
        let on_host = is_beside.then_some([store.offloaded_bytes() as u64, host_values, host_state]);
        let beside = if store.offload().optimizer { 1 } else { copies as u64 };
        let trained = beside * store.computed_bytes() as u64;
        // Sums of all weights are laid aside block by block, which is little.
        let aside = session.adapter_spec.as_ref().map_or(0, |_| store.bytes_aside(session.engine.sums(micro_steps)));
        // Those that the optimizer has at home are there.
        let lasting = if host_values > 0 { 0 } else { store.gradient_bytes() };
        let gradients = (lasting + aside) as u64;
        let (weights, adapters) = match session.adapter_spec {
            Some(_) => {
                let away = on_host.map_or(0, |[weights, ..]| weights) + store.bytes_in_file() as u64;
                (store.frozen_bytes() as u64 - away, trained)
            }
            None => (trained, 0),
        };
        let ledger = Ledger::default();
        let kinds = [
            (Kind::Weights, weights),
            (Kind::Adapters, adapters),
            (Kind::Gradients, gradients),
            (Kind::Optimizer, state - host_state - in_file),
        ];
        let held = kinds.into_iter().filter(|&(_, bytes)| bytes > 0).map(|(kind, bytes)| {
            ledger.plan(kind, bytes);
            ledger.register(kind, bytes)
        });
        let held = held.collect();
        if kv_cache_bytes > 0 {
            // Weights that wait elsewhere come before the cache takes what is left.
            let free = device::free_memory(store.device()).unwrap_or(u64::MAX);
            ledger.plan(Kind::KvCache, kv_cache_bytes.min(free.saturating_sub(store.bytes_to_gather() as u64)));
        }
        let in_files = describe_files(session, optimizer);
        Self { kv_cache: ledger.register(Kind::KvCache, 0), on_host, in_files, _held: held, ledger }
    }

    /// Notes the bytes that the rollout's cache takes now.
    pub(super) fn set_kv_cache(&mut self, bytes: usize) {
        self.kv_cache.resize(bytes as u64);
    }

    /// The plan, for the opening of the run.
    pub(super) fn planned(&self) -> Section {
        let mut section = self.ledger.planned_section();
        if let Some(bytes) = self.on_host {
            let [weights, values, state] = bytes.map(units::bytes);
            section.push(
                "in host memory",
                format!(
                    "{weights} of weights, {values} of trained values and gradients, {state} of the optimizer's state"
                ),
            );
        }
        for text in &self.in_files {
            section.push("in files", text);
        }
        section
    }

    /// Plan and measured peak, for its end; on a GPU also the most of its memory that was in use.
    pub(super) fn measured(&self, session: &Session) -> anyhow::Result<Section> {
        let mut section = self.ledger.section();
        if let Some(footprint) = session.backend().memory()? {
            let [tensors, beside, slack, opening, loaded] =
                [footprint.tensors, footprint.beside_tensors(), footprint.slack, footprint.opening, footprint.loaded]
                    .map(units::bytes);
            section.push("device peak", format!("{tensors} of tensors and workspaces; {beside} beside them"));
            section.push(
                "beside them",
                format!("{opening} context, {loaded} code, libraries and other processes, {slack} free in the pool"),
            );
        }
        Ok(section)
    }
}
