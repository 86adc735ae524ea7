//! The phase of GRPO in which completions are sampled: all blocks are there for as long as it lasts.

use std::sync::atomic::{AtomicBool, Ordering};

use super::generation::Generator;
use super::run::Run;
use super::session::Session;
use crate::config::settings::GrpoSettings;
use crate::data::Prompts;
use crate::rollout::{Completion, forward};

/// Bytes that a rollout needs beside the weights to be worth having them all there: what a step takes, and a cache for some of the
/// longest sequences.
fn rollout_room(settings: &GrpoSettings, session: &Session) -> usize {
    const SEQUENCES: usize = 4;
    let longest = settings.max_prompt_length.unwrap_or(0)
        + settings.longest_completion().min(session.engine.config().max_position_embeddings);
    forward::room_bytes(&session.engine, SEQUENCES.min(settings.max_num_seqs), longest)
}

/// Samples completions of prompts.
pub(super) fn sample(
    settings: &GrpoSettings,
    generator: &mut Generator<'_>,
    session: &mut Session,
    prompts: &Prompts,
    indices: &[usize],
    key: u64,
    run: &Run<'_>,
) -> anyhow::Result<Vec<Completion>> {
    with_all_there(settings, session, |session| {
        generator.sample(session, prompts, indices, key, &settings.sampling, &run.surroundings())
    })
}

/// Generates with all blocks there: ranks do not go in step while they do. With one rank, what has no room comes with each step.
pub(super) fn with_all_there<T>(
    settings: &GrpoSettings,
    session: &mut Session,
    generate: impl FnOnce(&Session) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    static SAID: AtomicBool = AtomicBool::new(false);
    let room = rollout_room(settings, session);
    let gathered = session.engine.store_mut().gather_all(room);
    let generated = gathered.map_err(anyhow::Error::from).and_then(|is_there| {
        if !is_there && !SAID.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the weights have no room on the device beside a rollout: each step of generation brings them from host memory, \
                 which is slow; leave `offload_param_device` out, or raise `device_memory_limit`"
            );
        }
        generate(session)
    });
    session.engine.store_mut().let_go();
    generated
}
