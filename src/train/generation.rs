//! One generation batch of GRPO: sample a group of completions for each prompt, reward them, turn rewards into
//! advantages, and cut the batch into micro-batches.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::run::Run;
use super::session::Session;
use crate::algo::{AdvantageInputs, AdvantageOutput, advantages, completion_statistics};
use crate::config::settings::{GrpoSettings, SamplingSettings};
use crate::data::{PromptExample, Tokenizer};
use crate::model::batch::{Batch, BatchBuilder};
use crate::reward::{self, Progress, Rewards};
use crate::rollout::forward::{EngineModel, kv_shape};
use crate::rollout::{Caller, Completion, Event, PAGE_TOKENS, Request, Rollout, RolloutSettings, Statistics};
use crate::telemetry::Sample;

/// One completion with everything the loss needs of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Sampled {
    /// Index of the prompt in the data set.
    pub(super) prompt: usize,
    pub(super) completion_ids: Vec<u32>,
    /// Log-probabilities under the distribution the tokens were drawn from.
    pub(super) sampling_logprobs: Vec<f32>,
    pub(super) is_truncated: bool,
    pub(super) advantage: f32,
    /// Under the policy that made it, as the trainer computes them; `None` while the batch is on policy.
    pub(super) old_logprobs: Option<Vec<f32>>,
    /// Under the reference policy, where the loss has a KL term.
    pub(super) ref_logprobs: Option<Vec<f32>>,
}

/// A generation batch and how far it is used up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct GenerationBatch {
    pub(super) samples: Vec<Sampled>,
    /// Micro-steps taken on it.
    pub(super) micro_steps: usize,
    /// Unmasked completion tokens of the whole batch.
    pub(super) num_items: usize,
}

/// Makes generation batches.
pub(super) struct Generator<'a> {
    settings: &'a GrpoSettings,
    rollout: Rollout,
    rewards: Rewards,
}

/// What scoring a set of completions came to.
pub(super) struct Scored {
    pub(super) outcome: AdvantageOutput,
    pub(super) metrics: BTreeMap<String, f64>,
    /// One per completion, ready for `completions.jsonl`.
    pub(super) records: Vec<Value>,
    /// The same for the console.
    pub(super) shown: Vec<Sample>,
}

/// The micro-batch of a generation batch as the engine and the loss take it.
pub(super) struct MicroBatch {
    pub(super) batch: Batch,
    /// Where each sample's tokens begin among the batch's targets: `[B + 1]`.
    pub(super) row_starts: Vec<usize>,
    pub(super) mask: Vec<u8>,
    pub(super) advantages: Vec<f32>,
}

impl<'a> Generator<'a> {
    /// Takes the rewards and checks the sampling settings.
    pub(super) fn new(settings: &'a GrpoSettings, session: &Session, rewards: Rewards) -> anyhow::Result<Self> {
        let rollout = Rollout::new(rollout_settings(settings, session.tokenizer.eos_ids()))?;
        Ok(Self { settings, rollout, rewards })
    }

    /// The reward functions.
    pub(super) fn rewards(&self) -> &Rewards {
        &self.rewards
    }

    /// Tells the reward functions that ask how far the run is.
    pub(super) fn show_progress(&mut self, step: u64, max_steps: u64) {
        let training = &self.settings.training;
        self.rewards.show_progress(Progress {
            step,
            max_steps,
            num_train_epochs: training.num_train_epochs,
            train_batch_size: training.per_device_train_batch_size,
        });
    }

    /// Counts and times of the last rollout.
    pub(super) fn statistics(&self) -> Statistics {
        self.rollout.statistics()
    }

    /// Bytes that the rollout's cache takes now.
    pub(super) fn cache_bytes(&self) -> usize {
        self.rollout.cache_bytes()
    }

    /// Gives the cache's memory back where training needs it: on a GPU. In host memory it is kept for the next rollout.
    pub(super) fn make_room(&mut self, session: &Session) {
        if !session.engine.device().is_cpu() {
            self.rollout.release_cache();
        }
    }

    /// Bytes that it may take: as many of the longest prompts with the longest completions as are computed at once.
    pub(super) fn most_cache_bytes(&self, session: &Session, prompts: &[PromptExample]) -> u64 {
        let longest = prompts.iter().map(|p| p.prompt_ids.len()).max().unwrap_or(0);
        let pages = (longest + self.settings.longest_completion() - 1).div_ceil(PAGE_TOKENS) + 2;
        let lanes = self.settings.max_num_seqs.min(self.settings.generation_batch_size) + 1;
        (lanes * pages * kv_shape(&session.engine).page_bytes()) as u64
    }

    /// Samples one completion for each entry of `prompts` (indices into `examples`, groups contiguous).
    ///
    /// `key` is the number of the generation batch: it and the place in `prompts` key the random draws.
    pub(super) fn sample(
        &mut self,
        session: &Session,
        examples: &[PromptExample],
        prompts: &[usize],
        key: u64,
        sampling: &SamplingSettings,
        run: &Run<'_>,
    ) -> anyhow::Result<Vec<Completion>> {
        let requests: Vec<Request> = prompts
            .iter()
            .enumerate()
            .map(|(sample, &prompt)| Request {
                sample_id: sample as u64,
                prompt_ids: examples[prompt].prompt_ids.clone(),
                group: prompt,
            })
            .collect();
        let bar = run.console.progress("rollout", requests.len() as u64, "sequences");
        let mut model = EngineModel::new(&session.engine, true)?;
        let (mut finished, mut tokens) = (0, 0);
        let mut on_event = |event: Event| match event {
            Event::Token { .. } => tokens += 1,
            Event::Finished { .. } => finished += 1,
            Event::Step { .. } => bar.set(finished, tokens),
        };
        let detokenize = |ids: &[u32]| session.tokenizer.decode(ids, false).unwrap_or_default();
        // A rollout that a signal cuts short is made anew by the run that goes on, with the same random numbers.
        let is_cancelled = || run.is_interrupted();
        let mut caller = Caller { on_event: &mut on_event, is_cancelled: &is_cancelled, detokenize: Some(&detokenize) };
        let seed = self.settings.training.seed;
        Ok(self.rollout.generate(&mut model, &requests, sampling, seed, key, &mut caller)?)
    }

    /// Rewards completions and turns rewards into group-relative advantages.
    pub(super) fn score(
        &mut self,
        session: &Session,
        examples: &[PromptExample],
        completions: &[Completion],
        group_size: usize,
        step: u64,
        is_interrupted: &dyn Fn() -> bool,
    ) -> anyhow::Result<Scored> {
        let texts: Vec<String> =
            completions.iter().map(|c| completion_text(&session.tokenizer, &c.token_ids)).collect::<Result<_, _>>()?;
        let samples: Vec<reward::Sample<'_>> = completions
            .iter()
            .zip(&texts)
            .map(|(completion, text)| {
                let example = &examples[completion.group];
                reward::Sample {
                    prompt: &example.prompt,
                    prompt_text: &example.prompt_text,
                    completion: text,
                    completion_ids: &completion.token_ids,
                    completion_tokens: completion.token_ids.len(),
                    max_completion_length: self.settings.longest_completion(),
                    is_truncated: completion.is_truncated(),
                    row: &example.row,
                }
            })
            .collect();
        let scores = self.rewards.score(&samples, is_interrupted).map_err(|error| {
            let context = format!("reward `{}` failed at step {step}", error.reward());
            anyhow::Error::new(error).context(context)
        })?;
        let functions = scores.by_function.len();
        let mut rewards = vec![f64::NAN; samples.len() * functions];
        for (index, scores) in scores.by_function.iter().enumerate() {
            for (sample, score) in scores.iter().enumerate() {
                rewards[sample * functions + index] = score.unwrap_or(f64::NAN);
            }
        }
        let outcome = advantages(&AdvantageInputs {
            rewards: &rewards,
            weights: &self.settings.reward_weights,
            group_size,
            aggregation: self.settings.multi_objective_aggregation,
            scale: self.settings.scale_rewards,
        })?;
        let lengths: Vec<usize> = completions.iter().map(|c| c.token_ids.len()).collect();
        let is_truncated: Vec<bool> = completions.iter().map(Completion::is_truncated).collect();
        let names = self.rewards.names();
        // What a function logs does not replace a metric of the trainer's own.
        let mut metrics = scores.metrics;
        metrics.extend(outcome.metrics(names));
        metrics.extend(completion_statistics(&lengths, &is_truncated)?.metrics());
        let by_name = |sample: usize| names.iter().zip(&rewards[sample * functions..(sample + 1) * functions]);
        let records = samples
            .iter()
            .zip(completions)
            .enumerate()
            .map(|(index, (sample, completion))| {
                let rewards: serde_json::Map<String, Value> =
                    by_name(index).map(|(name, &score)| (name.clone(), json!(score))).collect();
                let mut record = json!({
                    "step": step,
                    "prompt_index": completion.group,
                    "prompt": sample.prompt_text,
                    "completion": sample.completion,
                    "rewards": rewards,
                    "reward": outcome.rewards[index],
                    "advantage": outcome.advantages[index],
                    "completion_tokens": sample.completion_tokens,
                    "is_truncated": sample.is_truncated,
                });
                if let Some(record) = record.as_object_mut() {
                    for (name, values) in &scores.columns {
                        record.entry(name.clone()).or_insert_with(|| values[index].clone());
                    }
                }
                record
            })
            .collect();
        let shown = samples
            .iter()
            .enumerate()
            .map(|(index, sample)| Sample {
                prompt: sample.prompt_text.into(),
                completion: sample.completion.into(),
                rewards: by_name(index).map(|(name, &score)| (name.clone(), score)).collect(),
                advantage: Some(f64::from(outcome.advantages[index])),
                completion_tokens: Some(sample.completion_tokens),
            })
            .collect();
        Ok(Scored { outcome, metrics, records, shown })
    }
}

/// The rollout's limits: as many sequences at once as the settings say, in a cache that holds them all at full length.
pub(super) fn rollout_settings(settings: &GrpoSettings, eos: &[u32]) -> RolloutSettings {
    RolloutSettings {
        max_num_seqs: settings.max_num_seqs,
        max_batch_tokens: RolloutSettings::DEFAULT_BATCH_TOKENS.max(settings.max_num_seqs),
        kv_cache_bytes: usize::MAX,
        max_new_tokens: settings.longest_completion(),
        eos_token_ids: eos.to_vec(),
    }
}

/// A completion as reward functions see it: without special tokens.
fn completion_text(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String, crate::data::Error> {
    tokenizer.decode(ids, true)
}

impl GenerationBatch {
    /// Refuses a batch of a checkpoint that does not fit this run, in which indices would lead nowhere.
    pub(super) fn check(
        &self,
        completions: usize,
        life: usize,
        num_prompts: usize,
        vocab_size: usize,
    ) -> anyhow::Result<()> {
        let fits = |sample: &Sampled| {
            let len = sample.completion_ids.len();
            let others = [Some(&sample.sampling_logprobs), sample.old_logprobs.as_ref(), sample.ref_logprobs.as_ref()];
            sample.prompt < num_prompts
                && sample.completion_ids.iter().all(|&id| (id as usize) < vocab_size)
                && others.into_iter().flatten().all(|logprobs| logprobs.len() == len)
        };
        let problem = if self.samples.len() != completions {
            format!("has {} completions, this run makes {completions}", self.samples.len())
        } else if self.micro_steps >= life {
            format!("is at micro-step {} of {life}", self.micro_steps)
        } else if let Some(wrong) = self.samples.iter().position(|sample| !fits(sample)) {
            format!("has a completion, number {wrong}, that does not fit this run's {num_prompts} prompts or its model")
        } else {
            return Ok(());
        };
        anyhow::bail!(
            "the generation batch in the checkpoint {problem}; resume with the data and the settings of that run, or from \
             another checkpoint"
        )
    }

    /// Takes scored completions; `mask_truncated` leaves truncated ones out of the loss.
    pub(super) fn new(completions: Vec<Completion>, outcome: &AdvantageOutput, mask_truncated: bool) -> Self {
        let samples: Vec<Sampled> = completions
            .into_iter()
            .zip(&outcome.advantages)
            .map(|(completion, &advantage)| Sampled {
                prompt: completion.group,
                is_truncated: completion.is_truncated(),
                completion_ids: completion.token_ids,
                sampling_logprobs: completion.sampling_logprobs,
                advantage,
                old_logprobs: None,
                ref_logprobs: None,
            })
            .collect();
        let is_counted = |s: &&Sampled| !(mask_truncated && s.is_truncated);
        let num_items = samples.iter().filter(is_counted).map(|s| s.completion_ids.len()).sum();
        Self { samples, micro_steps: 0, num_items }
    }

    /// Puts samples into one ragged batch. Each distinct prompt stands in it once and is shared by its completions; the
    /// last token of a completion predicts nothing and is left out.
    pub(super) fn micro_batch(
        samples: &[Sampled],
        examples: &[PromptExample],
        mask_truncated: bool,
    ) -> anyhow::Result<MicroBatch> {
        let mut builder = BatchBuilder::new();
        let mut prompts = HashMap::new();
        let (mut row_starts, mut mask) = (vec![0], Vec::new());
        for (index, sample) in samples.iter().enumerate() {
            let prompt = prompts
                .entry(sample.prompt)
                .or_insert_with(|| builder.push(&examples[sample.prompt].prompt_ids, prompt_key(sample.prompt)))
                .clone();
            let ids = &sample.completion_ids;
            let (Some(&first), Some((_, inputs))) = (ids.first(), ids.split_last()) else {
                row_starts.push(mask.len());
                continue;
            };
            builder.predict(prompt.end - 1, first);
            if !inputs.is_empty() {
                let rows = builder.push_after(prompt, inputs, completion_key(sample.prompt, index));
                for (row, &target) in rows.zip(&ids[1..]) {
                    builder.predict(row, target);
                }
            }
            let is_counted = u8::from(!(mask_truncated && sample.is_truncated));
            mask.resize(mask.len() + ids.len(), is_counted);
            row_starts.push(mask.len());
        }
        let advantages = samples.iter().map(|s| s.advantage).collect();
        Ok(MicroBatch { batch: builder.build()?, row_starts, mask, advantages })
    }
}

/// Keys of dropout: a prompt has one of its own, a completion one by its prompt and its place in the batch.
fn prompt_key(prompt: usize) -> u64 {
    (prompt as u64) << 32
}

fn completion_key(prompt: usize, index: usize) -> u64 {
    prompt_key(prompt) | (index as u64 + 1)
}
