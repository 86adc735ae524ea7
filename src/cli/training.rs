//! The arguments that `sft` and `grpo` share.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{Context, Diagnostics, Exit, Interrupt, UsageError, launch};
use crate::config::settings::TrainingSettings;
use crate::config::{self, ConfigError, Loaded, Source};
use crate::fs::io_error;
use crate::ranks::{
    self,
    launch::{Launcher, Place},
};
use crate::reward;
use crate::train::{self, Outcome};

/// What to train, and with which changes to the file.
#[derive(Clone, Debug, clap::Args)]
pub struct TrainingArgs {
    /// The configuration: a YAML file with the keys that TRL uses
    #[arg(value_name = "CONFIG")]
    config: Option<PathBuf>,

    /// The same, as TRL's commands take it
    #[arg(long = "config", value_name = "CONFIG", conflicts_with = "config")]
    named_config: Option<PathBuf>,

    /// Replace a key of the file, e.g. `--set learning_rate=2e-6`; may be given several times, the last one wins
    ///
    /// The value is read as YAML: `--set 'lora_target_modules=[q_proj, v_proj]'`. Every key is an option as well, as with
    /// TRL: `--learning_rate 2e-6 --lora_target_modules q_proj v_proj --bf16 --no_gradient_checkpointing`.
    /// `trainer config --reference` lists the keys.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = parse_override)]
    pub overrides: Vec<(String, String)>,

    /// The launch file: how many ranks there are, and what they share
    ///
    /// accelerate's YAML, as `accelerate launch` takes it, or TRL's name of one (`zero2`). Stands for `accelerate_config` of the
    /// file and wins over it; the other keys of the file win over the launch file.
    #[arg(long = "config-file", alias = "config_file", value_name = "FILE")]
    launch_file: Option<PathBuf>,

    /// Go on from a checkpoint: the newest whole one of `output_dir`, or the one given
    ///
    /// `auto` is the newest one, or a start where there is none: for jobs that are put back into a queue. Wins over
    /// `resume_from_checkpoint` in the file. The run continues as if it had never stopped.
    #[arg(long, value_name = "CHECKPOINT")]
    #[expect(clippy::option_option, reason = "clap's form of a flag with an optional value")]
    resume: Option<Option<PathBuf>>,
}

impl TrainingArgs {
    /// The path of the configuration file.
    fn file(&self) -> Option<PathBuf> {
        let path = self.config.as_ref().or(self.named_config.as_ref())?;
        Some(PathBuf::from(config::expand_home(&path.to_string_lossy())))
    }

    /// The configuration; without a file, keys of the command line make it up.
    fn source(&self) -> anyhow::Result<Result<Source, ConfigError>> {
        match self.file() {
            Some(path) => Ok(Source::read(&path)),
            None if !self.overrides.is_empty() => Ok(Ok(Source::new("command line", ""))),
            None => Err(UsageError(
                "nothing says what to train: give a file (<CONFIG>), or keys: `--model_name_or_path MODEL --dataset_name DATA`"
                    .into(),
            )
            .into()),
        }
    }

    /// `--set`, `--config-file` and `--resume` as overrides of the file, in this order: the last one wins.
    fn overrides(&self) -> Vec<String> {
        let mut overrides: Vec<String> = self.overrides.iter().map(|(key, value)| format!("{key}={value}")).collect();
        overrides.extend(self.launch_file.iter().map(|path| format!("accelerate_config={}", quoted(path))));
        overrides.extend(self.resume.iter().map(|resume| match resume {
            None => "resume_from_checkpoint=true".into(),
            Some(path) => format!("resume_from_checkpoint={}", quoted(path)),
        }));
        overrides
    }
}

/// A path as a value in YAML.
pub(super) fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "''"))
}

/// The variables of this process.
pub(super) fn environment() -> BTreeMap<String, String> {
    let text = |text: OsString| text.to_string_lossy().into_owned();
    std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
}

/// This process's place among the ranks that a launcher started, by its environment.
pub(super) fn place() -> Result<Option<Place>, ranks::launch::Error> {
    ranks::launch::place(&environment())
}

/// The folder that a configuration lies in.
pub(super) fn folder_of(path: &Path) -> Option<PathBuf> {
    path.canonicalize().ok()?.parent().map(Path::to_path_buf)
}

/// What a configuration depends on besides its text.
pub(super) fn surroundings(launched: Option<usize>, config_folder: Option<&Path>) -> config::Context<'_> {
    config::Context {
        launched,
        visible_gpus: train::visible_gpus(),
        config_folder,
        git_commit: option_env!("TRAINER_GIT_COMMIT"),
        check_reward: Some(reward::check),
        has_bf16: train::has_bf16(),
    }
}

/// Reads the configuration and runs a training loop on it.
pub(super) fn run<S>(
    args: &TrainingArgs,
    context: &Context,
    load: impl Fn(&Source, &[String], &config::Context<'_>) -> Result<Loaded<S>, ConfigError>,
    shared: impl Fn(&S) -> &TrainingSettings,
    train: impl Fn(&S, train::Context<'_>) -> anyhow::Result<Outcome>,
) -> anyhow::Result<Exit> {
    let environment = environment();
    let place = ranks::launch::place(&environment).map_err(|error| UsageError(error.to_string()))?;
    // A launcher that starts one process leaves it to this program how many ranks there are.
    let launched = place.as_ref().map(|place| place.world_size).filter(|&ranks| ranks > 1);
    let has_colours = context.terminal.is_interactive();
    let in_colour = |error: ConfigError| Diagnostics(error.render(has_colours));
    let source = args.source()?.map_err(in_colour)?;
    let config_folder = args.file().and_then(|path| folder_of(&path));
    let surroundings = surroundings(launched, config_folder.as_deref());
    let loaded = load(&source, &args.overrides(), &surroundings).map_err(in_colour)?;
    let settings = shared(&loaded.settings);
    if launched.is_none() && settings.ranks.world_size > 1 {
        return launch::run(settings.ranks.world_size);
    }
    if let Some(rank) = place.as_ref().map(|place| place.rank) {
        become_rank(rank, place.as_ref().is_some_and(|place| place.launcher == Launcher::Own), &settings.output_dir)?;
    }
    let place = place.filter(|_| launched.is_some());
    if let Some(place) = &place {
        share_cores(place, &environment)?;
    }
    let local_rank = place.as_ref().map_or(0, |place| place.local_rank);
    let interrupt = Interrupt::listen()?;
    let asked = interrupt.clone();
    let deadline = Duration::from_secs(settings.ranks.timeout_secs);
    let ranks = ranks::join(place, deadline).map_err(|error| match error {
        ranks::Error::NoPlace { .. } => UsageError(error.to_string()).into(),
        error => anyhow::Error::from(error),
    })?;
    let outcome = train(
        &loaded.settings,
        train::Context {
            terminal: context.terminal.clone(),
            ranks: Arc::clone(&ranks),
            local_rank,
            visible_devices: environment.get("CUDA_VISIBLE_DEVICES").cloned(),
            ready: &|| interrupt.ready(),
            is_interrupted: Arc::new(move || asked.requested()),
            resolved_yaml: &loaded.resolved_yaml,
            warnings: &loaded.warnings,
        },
    );
    let outcome = outcome.inspect_err(|error| ranks.abandon(&format!("{error:#}")))?;
    // Whoever is done first would look lost to the others.
    ranks.barrier()?;
    let is_first = ranks.is_first();
    Ok(match outcome {
        Outcome::Finished => {
            if let Some(command) = settings.upload_command().filter(|_| is_first) {
                context.print(&format!("\nNothing was uploaded; this does it:\n  {command}\n"))?;
            }
            Exit::Done
        }
        Outcome::Interrupted => Exit::Interrupted,
    })
}

/// Gives this rank its part of the machine's cores, unless somebody said how many threads it has.
pub(super) fn share_cores(place: &Place, environment: &BTreeMap<String, String>) -> anyhow::Result<()> {
    let number = |name: &str| environment.get(name).and_then(|value| value.trim().parse::<usize>().ok());
    if number("RAYON_NUM_THREADS").is_some() {
        return Ok(());
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = || cores / place.local_world_size.unwrap_or(1).max(1);
    let threads = number("SLURM_CPUS_PER_TASK").filter(|_| place.launcher == Launcher::Srun).unwrap_or_else(share);
    Ok(rayon::ThreadPoolBuilder::new().num_threads(threads.clamp(1, cores)).build_global()?)
}

/// Ends with the program that started this rank, if that was this one, and for every rank but the first puts what it prints into
/// a file: one rank is on the console.
fn become_rank(rank: usize, is_own: bool, output_dir: &Path) -> anyhow::Result<()> {
    if is_own {
        // Asked to stop, it saves.
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)?;
    }
    if rank == 0 {
        return Ok(());
    }
    let folder = output_dir.join("logs");
    std::fs::create_dir_all(&folder).map_err(io_error("create the folder", &folder))?;
    let path = folder.join(format!("rank-{rank}.log"));
    let file = std::fs::File::options().create(true).append(true).open(&path).map_err(io_error("open", &path))?;
    nix::unistd::dup2_stdout(&file).and_then(|()| nix::unistd::dup2_stderr(&file))?;
    let line = format!("rank {rank}, process {}, {}\n", std::process::id(), jiff::Timestamp::now());
    std::io::Write::write_all(&mut &file, line.as_bytes()).map_err(io_error("write", &path))?;
    Ok(())
}

pub(super) fn parse_override(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().into(), value.trim().into())),
        _ => Err("expected KEY=VALUE, e.g. `learning_rate=2e-6`".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: TrainingArgs,
    }

    fn parse(arguments: &[&str]) -> Result<TrainingArgs, String> {
        let all = ["trainer"].iter().chain(arguments);
        Cli::try_parse_from(all).map(|cli| cli.args).map_err(|error| error.to_string())
    }

    #[test]
    fn overrides_keep_their_order_and_everything_after_the_first_equals_sign() {
        let args = parse(&["c.yaml", "--set", "a=1", "--set", "b = x=y", "--set", "a="]).unwrap();
        let expected = [("a", "1"), ("b", "x=y"), ("a", "")].map(|(k, v)| (k.to_string(), v.to_string()));
        assert_eq!(args.overrides, expected);
        for wrong in ["learning_rate", "=3"] {
            let message = parse(&["c.yaml", "--set", wrong]).unwrap_err();
            assert!(message.contains("expected KEY=VALUE"), "{message}");
        }
    }

    #[test]
    fn resume_is_an_override_of_the_file_that_comes_last() {
        let overrides = |arguments: &[&str]| parse(arguments).unwrap().overrides();
        assert!(overrides(&["c.yaml"]).is_empty());
        assert_eq!(overrides(&["c.yaml", "--resume"]), ["resume_from_checkpoint=true"]);
        assert_eq!(overrides(&["c.yaml", "--resume", "--set", "a=1"]), ["a=1", "resume_from_checkpoint=true"]);
        let expected = ["resume_from_checkpoint='out/checkpoint-5'"];
        assert_eq!(overrides(&["c.yaml", "--resume", "out/checkpoint-5"]), expected);
        assert_eq!(overrides(&["--resume=out/checkpoint-5", "c.yaml"]), expected);
        // An empty variable of a script is not a wish for the newest.
        assert!(parse(&["c.yaml", "--resume", ""]).is_err());
    }

    #[test]
    fn the_launch_file_is_an_override_of_the_file() {
        let overrides = |arguments: &[&str]| parse(arguments).unwrap().overrides();
        let expected = ["accelerate_config='it''s/zero3.yaml'"];
        for option in ["--config-file", "--config_file"] {
            assert_eq!(overrides(&["c.yaml", option, "it's/zero3.yaml"]), expected);
            assert_eq!(overrides(&[option, "it's/zero3.yaml", "c.yaml"]), expected);
            assert_eq!(overrides(&[&format!("{option}=it's/zero3.yaml"), "c.yaml"]), expected);
        }
        let both = overrides(&["c.yaml", "--resume", "--config-file", "z", "--set", "a=1"]);
        assert_eq!(both, ["a=1", "accelerate_config='z'", "resume_from_checkpoint=true"]);
    }
}
