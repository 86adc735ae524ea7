//! Steps, epochs, learning rates and occasions of whole runs, against what transformers' and TRL's trainers count.

use std::path::Path;

use serde::Deserialize;
use trainer::config::settings::{Interval, LrSchedulerType};
use trainer::data::{Epoch, PromptBatches, RowBatches};
use trainer::optim::LrSchedule;
use trainer::train::Cadence;

use crate::report::Report;

/// All are f64 sums of a few terms in both.
const TOLERANCE: f64 = 1e-12;

#[derive(Deserialize)]
struct File {
    runs: Vec<Run>,
    lengths: Vec<Length>,
    repeats: Vec<Repeat>,
}

/// A recorded run.
#[derive(Deserialize)]
struct Run {
    rows: usize,
    batch: usize,
    accumulation: usize,
    epochs: f64,
    max_steps: Option<usize>,
    #[serde(default)]
    drop_last: bool,
    num_generations: Option<usize>,
    #[serde(default)]
    steps_per_generation: usize,
    #[serde(default)]
    num_iterations: usize,
    #[serde(default)]
    generation_batch_size: usize,
    #[serde(default)]
    prompts_of_generations: Vec<usize>,
    warmup: f64,
    logging: (String, Option<usize>),
    logging_first_step: bool,
    evaluation: (String, Option<usize>),
    eval_delay: f64,
    eval_on_start: bool,
    saving: (String, Option<usize>),
    micro_steps_per_epoch: u64,
    steps_per_epoch: u64,
    total: u64,
    epoch: Vec<f64>,
    lr: Vec<f64>,
    micro_batches: Vec<Vec<usize>>,
    logged: Vec<u64>,
    evaluated: Vec<u64>,
    saved: Vec<u64>,
}

/// The length of a rank's data loader.
#[derive(Debug, Deserialize)]
struct Length {
    rows: usize,
    batch: usize,
    world_size: usize,
    drop_last: bool,
    micro_steps: u64,
}

/// What TRL's sampler makes of an epoch.
#[derive(Debug, Deserialize)]
struct Repeat {
    prompts: usize,
    prompts_per_batch: usize,
    num_generations: usize,
    repeats: usize,
    rows: u64,
    distinct: usize,
}

/// Sizes of the micro-batches of a step.
type Sizes = Box<dyn Fn(u64) -> Vec<usize>>;

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let file: File = serde_json::from_slice(&std::fs::read(folder.join("steps.json"))?)?;
    for (index, run) in file.runs.iter().enumerate() {
        check(&format!("run {index}"), run, report)?;
    }
    for length in &file.lengths {
        let Length { rows, batch, world_size, drop_last, micro_steps } = *length;
        // No batch at all is an error here.
        let ours = RowBatches::new(rows, batch, world_size, drop_last, 1).map_or(0, |b| b.epoch().micro_steps());
        report.expect("length", ours == micro_steps, || format!("{length:?}: {ours}"));
    }
    for repeat in &file.repeats {
        let Repeat { prompts, prompts_per_batch, num_generations, repeats, rows, distinct } = *repeat;
        if rows == 0 {
            // TRL has no batch then and does not train.
            continue;
        }
        let size = prompts_per_batch * num_generations;
        let ours = PromptBatches::new(prompts, (size, num_generations), size, 1, repeats, 1)?;
        let found = (ours.epoch().micro_steps() * size as u64, prompts - ours.left_out());
        report.expect("repeat", found == (rows, distinct), || format!("{repeat:?}: {found:?}"));
    }
    Ok(())
}

fn check(case: &str, run: &Run, report: &mut Report) -> anyhow::Result<()> {
    let (epoch, sizes) = plan(run, case, report)?;
    let total = epoch.total_steps(run.epochs, run.max_steps);
    let counts = (epoch.micro_steps(), epoch.steps(), total);
    let expected = (run.micro_steps_per_epoch, run.steps_per_epoch, run.total);
    report.expect(case, counts == expected, || format!("{counts:?}, expected {expected:?}"));

    let warmup = if run.warmup < 1.0 { (run.warmup * total as f64).ceil() } else { run.warmup };
    let no_arguments = serde_json::Map::new();
    let schedule = LrSchedule::new(LrSchedulerType::Linear, 1.0, warmup as usize, total as usize, &no_arguments)?;
    for step in 0..total {
        let (lr, passed) = (schedule.lr(step), epoch.after(step + 1));
        report.check(&format!("{case} lr {step}"), (lr - run.lr[step as usize]).abs(), TOLERANCE);
        report.check(&format!("{case} epoch {step}"), (passed - run.epoch[step as usize]).abs(), TOLERANCE);
        let (ours, theirs) = (sizes(step), &run.micro_batches[step as usize]);
        report.expect(case, ours == *theirs, || format!("step {step} takes {ours:?}, expected {theirs:?}"));
    }

    let cadence = Cadence {
        logging: interval(&run.logging),
        logging_first_step: run.logging_first_step,
        evaluation: interval(&run.evaluation),
        eval_delay: run.eval_delay,
        saving: interval(&run.saving),
        epoch,
        total,
    };
    let due: Vec<_> = (1..=total).map(|steps| (steps, cadence.after(steps))).collect();
    let steps = |pick: fn(&trainer::train::Due) -> bool| -> Vec<u64> {
        due.iter().filter(|(_, due)| pick(due)).map(|(step, _)| *step).collect()
    };
    let start = run.eval_on_start.then_some(0);
    let evaluated: Vec<u64> = start.into_iter().chain(steps(|due| due.evaluate)).collect();
    report
        .expect(case, evaluated == run.evaluated, || format!("evaluates {evaluated:?}, expected {:?}", run.evaluated));
    let saved = steps(|due| due.save);
    report.expect(case, saved == run.saved, || format!("saves {saved:?}, expected {:?}", run.saved));
    // The last step is always logged here.
    let mut expected = run.logged.clone();
    if expected.last() != Some(&total) {
        expected.push(total);
    }
    let logged = steps(|due| due.log);
    report.expect(case, logged == expected, || format!("logs {logged:?}, expected {expected:?}"));
    Ok(())
}

/// The epoch of a run, and what each of its steps takes.
fn plan(run: &Run, case: &str, report: &mut Report) -> anyhow::Result<(Epoch, Sizes)> {
    let Some(num_generations) = run.num_generations else {
        let rows = RowBatches::new(run.rows, run.batch, 1, run.drop_last, run.accumulation)?;
        let sizes = move |step| rows.epoch().place(step).micro_steps.map(|m| rows.of_rank(m, 0).len()).collect();
        return Ok((rows.epoch(), Box::new(sizes)));
    };
    let sizes = (run.generation_batch_size, num_generations);
    let prompts = PromptBatches::new(run.rows, sizes, run.batch, 1, run.num_iterations, run.accumulation)?;
    report.expect(case, prompts.slices() == run.steps_per_generation, || format!("{} slices", prompts.slices()));
    let epoch = prompts.epoch();
    let total = epoch.total_steps(run.epochs, run.max_steps);
    let slices = (0..total).flat_map(|step| epoch.place(step).micro_steps).map(|m| prompts.slice(m));
    let asked: Vec<usize> = slices.filter(|s| s.micro_steps_before == 0).map(|s| s.prompts.len()).collect();
    let theirs = &run.prompts_of_generations;
    report.expect(case, asked == *theirs, || format!("generates for {asked:?}, expected {theirs:?}"));
    let batch = run.batch;
    Ok((epoch, Box::new(move |step| epoch.place(step).micro_steps.map(|_| batch).collect())))
}

fn interval((strategy, steps): &(String, Option<usize>)) -> Interval {
    match (strategy.as_str(), steps) {
        ("steps", Some(steps)) => Interval::Steps(*steps),
        ("epoch", _) => Interval::Epoch,
        _ => Interval::No,
    }
}
