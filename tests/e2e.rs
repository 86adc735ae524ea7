//! End to end: the real binary on tiny models. What it learns and leaves, how it resumes, and how it fails.
//!
//! Nothing here needs a network, a GPU or more than a minute on 2 cores.

#[path = "support/kill.rs"]
mod kill;
#[path = "support/test_run.rs"]
mod test_run;

#[path = "e2e/adapters.rs"]
mod adapters;
#[path = "e2e/bad_input.rs"]
mod bad_input;
#[path = "e2e/best.rs"]
mod best;
#[path = "e2e/changed.rs"]
mod changed;
#[path = "e2e/command_line.rs"]
mod command_line;
#[path = "e2e/courses.rs"]
mod courses;
#[path = "e2e/disk.rs"]
mod disk;
#[path = "e2e/evaluate.rs"]
mod evaluate;
#[path = "e2e/generate.rs"]
mod generate;
#[path = "e2e/interrupt.rs"]
mod interrupt;
#[path = "e2e/nvme.rs"]
mod nvme;
#[path = "e2e/preprocess.rs"]
mod preprocess;
#[path = "e2e/ranks.rs"]
mod ranks;
#[path = "e2e/recipes.rs"]
mod recipes;
#[path = "e2e/resume.rs"]
mod resume;
#[path = "e2e/rewards.rs"]
mod rewards;
#[path = "e2e/steps.rs"]
mod steps;
#[path = "e2e/training.rs"]
mod training;
#[path = "e2e/turns.rs"]
mod turns;
