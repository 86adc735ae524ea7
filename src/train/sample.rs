//! The phase of GRPO in which completions are sampled: all blocks are there for as long as it lasts.

use std::sync::atomic::{AtomicBool, Ordering};

use super::generation::Generator;
use super::run::Run;
use super::session::Session;
use crate::config::settings::GrpoSettings;
use crate::data::Prompts;
use crate::rollout::{Completion, forward};
use crate::zero::Room;

/// Bytes that a rollout needs beside the weights: what a step takes, and a cache for one of the longest sequences, or for some of them
/// to be worth having the weights all there.
fn rollout_room(settings: &GrpoSettings, session: &Session) -> Room {
    const SEQUENCES: usize = 4;
    let longest = settings.max_prompt_length.unwrap_or(0)
        + settings.longest_completion().min(session.engine.config().max_position_embeddings);
    let of = |sequences| forward::room_bytes(&session.engine, sequences, longest);
    Room { wanted: of(SEQUENCES.min(settings.max_num_seqs)), least: of(1) }
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
