//! One generation batch of GRPO: sample a group of completions for each prompt, reward them (as far as can be while others are
//! sampled, `beside.rs`), turn rewards into advantages, and cut the batch into micro-batches.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::beside::{self, Early, completion_text};
use super::dealing::{self, Dealt, Lengths};
use super::gathered;
use super::session::Session;
use crate::algo::{AdvantageInputs, AdvantageOutput, advantages, completion_statistics};
use crate::config::settings::{GrpoSettings, SamplingSettings};
use crate::data::{self, Prompts};
use crate::model::batch::{Batch, BatchBuilder};
use crate::ranks::Ranks;
use crate::reward::{self, Progress, Rewards, Scores};
use crate::rollout::forward::{EngineModel, kv_shape};
use crate::rollout::sizes::cache_pages;
use crate::rollout::{Caller, Completion, Event, Request, Reserve, Rollout, RolloutSettings, Statistics};
use crate::telemetry::{Console, Sample};

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
    lengths: Lengths,
    /// Scores of the last rollout's completions that were made beside it.
    early: Early,
}

/// With whom completions are made, where it is shown, and whether it is to be given up.
pub(super) struct Surroundings<'a> {
    pub(super) ranks: Arc<dyn Ranks>,
    pub(super) console: &'a Console,
    pub(super) is_interrupted: &'a (dyn Fn() -> bool + Sync),
}

/// What scoring a set of completions came to.
pub(super) struct Scored {
    pub(super) outcome: AdvantageOutput,
    /// By completion, then by reward function: `[N, F]`; NaN where a function gave none.
    pub(super) rewards: Vec<f64>,
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
        let rollout = Rollout::new(rollout_settings(settings, session.tokenizer.eos_ids(), session.engine.device()))?;
        Ok(Self { settings, rollout, rewards, lengths: Lengths::default(), early: Early::default() })
    }

    /// The reward functions.
    pub(super) fn rewards(&self) -> &Rewards {
        &self.rewards
    }

    /// Gives the reward functions back.
    pub(super) fn into_rewards(self) -> Rewards {
        self.rewards
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

    /// Seconds that rewards took beside the last rollout, and those of them after it.
    pub(super) fn early_reward_secs(&self) -> (f64, f64) {
        (self.early.secs, self.early.left_secs)
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

    /// Bytes that it may take: as many of the longest prompts with the longest completions as are computed at once, in training
    /// or in an evaluation.
    pub(super) fn most_cache_bytes(&self, session: &Session, prompts: &Prompts, eval: Option<&Prompts>) -> u64 {
        let longest = eval.map_or(0, Prompts::longest).max(prompts.longest());
        let longest = (longest + self.settings.longest_completion()).saturating_sub(1);
        let evaluated = eval.map_or(0, Prompts::len) * self.settings.num_generations_eval;
        let of_rank =
            self.settings.generation_batch_size.max(evaluated).div_ceil(self.settings.training.ranks.world_size);
        let lanes = self.settings.max_num_seqs.min(of_rank);
        cache_pages(lanes, longest).saturating_mul(kv_shape(&session.engine).page_bytes()) as u64
    }

    /// Samples one completion for each entry of `prompts` (indices into `examples`, groups contiguous). Each rank makes a part of
    /// them, and all get all.
    ///
    /// `key` is the number of the generation batch: it and the place in `prompts` key the random draws.
    pub(super) fn sample(
        &mut self,
        session: &Session,
        examples: &Prompts,
        prompts: &[usize],
        key: u64,
        sampling: &SamplingSettings,
        surroundings: &Surroundings<'_>,
    ) -> anyhow::Result<Vec<Completion>> {
        let ranks = &*surroundings.ranks;
        let distinct: BTreeSet<usize> = prompts.iter().copied().collect();
        let ids_of = |prompt: usize| Ok((prompt, examples.get(prompt)?.prompt_ids.clone()));
        let ids: BTreeMap<usize, Vec<u32>> = distinct.into_iter().map(ids_of).collect::<Result<_, data::Error>>()?;
        let Dealt { own, rest } = self.deal(session, prompts, &ids, ranks.world_size());
        let own = own.into_iter().nth(ranks.rank()).unwrap_or_default();
        let request = |sample: usize| {
            let prompt = prompts[sample];
            Request { sample_id: sample as u64, prompt_ids: ids[&prompt].clone(), group: prompt }
        };
        let requests: Vec<Request> = own.iter().chain(&rest).cloned().flatten().map(request).collect();
        let first: usize = own.iter().map(Range::len).sum();
        let mut end = first;
        let rest: Vec<Range<usize>> = rest
            .iter()
            .map(|group| {
                end += group.len();
                end - group.len()..end
            })
            .collect();
        let mut taken = 0;
        let mut take = || {
            let turn = ranks.next_turn(taken)?;
            taken += 1;
            Ok(usize::try_from(turn).ok().and_then(|turn| rest.get(turn)).cloned())
        };
        let most_taken = rest.iter().map(Range::len).max().unwrap_or(0);
        let most_unfinished = first.max(most_taken).min(self.settings.max_num_seqs);
        let reserve = Reserve { first, most_taken, most_unfinished, take: &mut take };
        let own = self.make(session, examples, (&requests, reserve), key, sampling, surroundings)?;
        tracing::debug!(
            "made {} of {} completions: {first} were dealt to this rank, and {} it took of those that were not",
            own.len(),
            prompts.len(),
            own.len() - first
        );
        if ranks.world_size() > 1 {
            let shares = gathered::in_order(self.early.shares(), ranks)?;
            self.early = std::mem::take(&mut self.early).joined(shares);
        }
        let mut all = gathered::in_order(own, ranks)?;
        all.sort_by_key(|completion| completion.sample_id);
        let is_whole = all.len() == prompts.len() && (0..).zip(&all).all(|(id, made)| made.sample_id == id);
        anyhow::ensure!(
            is_whole,
            "the ranks made {} completions of {}, or one of them twice",
            all.len(),
            prompts.len()
        );
        self.lengths.see(prompts.iter().map(|prompt| ids[prompt].as_slice()).zip(&all));
        Ok(all)
    }

    /// Which rank makes which completions of prompts with these tokens.
    fn deal(&self, session: &Session, prompts: &[usize], ids: &BTreeMap<usize, Vec<u32>>, world_size: usize) -> Dealt {
        // Some length before any was seen.
        let unknown = self.settings.longest_completion().div_ceil(2);
        // On a GPU the last bits of logits depend on what is computed beside them. And there a rank that computes all of its part at
        // once loses by beginning with some of it.
        let is_on_cpu = session.engine.device().is_cpu();
        let is_free = is_on_cpu || !self.settings.training.full_determinism;
        let waits = prompts.len().div_ceil(world_size) > self.settings.max_num_seqs;
        let groups = dealing::groups(prompts, |prompt, samples| {
            let ids = &ids[&prompt];
            let length = if is_free { self.lengths.expected(ids, unknown) } else { unknown };
            ids.len() + samples * length
        });
        dealing::deal(groups, world_size, is_on_cpu || (is_free && waits))
    }

    /// The completions of these requests, in their order; `key` and the requests' ids key the random draws. Their groups are
    /// prompts of `examples`.
    pub(super) fn complete(
        &mut self,
        session: &Session,
        examples: &Prompts,
        requests: &[Request],
        key: u64,
        sampling: &SamplingSettings,
        surroundings: &Surroundings<'_>,
    ) -> anyhow::Result<Vec<Completion>> {
        let take = &mut || Ok(None);
        let none = Reserve { first: requests.len(), most_taken: 0, most_unfinished: 0, take };
        self.make(session, examples, (requests, none), key, sampling, surroundings)
    }

    /// The same, of the requests that this rank makes anyway and what it takes of the others. Keeps the scores that are made
    /// meanwhile.
    fn make(
        &mut self,
        session: &Session,
        examples: &Prompts,
        (requests, reserve): (&[Request], Reserve<'_>),
        key: u64,
        sampling: &SamplingSettings,
        surroundings: &Surroundings<'_>,
    ) -> anyhow::Result<Vec<Completion>> {
        // Of those that are not dealt it takes its equal part, perhaps.
        let expected = reserve.first + (requests.len() - reserve.first).div_ceil(surroundings.ranks.world_size());
        let bar = surroundings.console.progress("rollout", expected as u64, "sequences");
        let mut model = EngineModel::new(&session.engine, true)?.recorded()?;
        let (mut finished, mut tokens) = (0, 0);
        let mut show = |event: Event| match event {
            Event::Token { .. } => tokens += 1,
            Event::Finished { .. } => finished += 1,
            Event::Step { .. } => bar.set(finished, tokens),
        };
        let detokenize = |ids: &[u32]| session.tokenizer.decode(ids, false).unwrap_or_default();
        // A rollout that a signal cuts short is made anew by the run that goes on, with the same random numbers.
        let is_cancelled = surroundings.is_interrupted;
        let Self { rollout, rewards, settings, .. } = self;
        let material = material(settings, session, examples);
        let generate = |hear: &mut dyn FnMut(Event)| {
            let mut on_event = |event: Event| {
                show(event);
                hear(event);
            };
            let mut caller = Caller { on_event: &mut on_event, is_cancelled, detokenize: Some(&detokenize) };
            rollout.generate_with(&mut model, (requests, reserve), sampling, settings.training.seed, key, &mut caller)
        };
        let (made, early) = beside::score_beside(rewards.of_each(), &material, requests, is_cancelled, generate)?;
        self.early = early;
        Ok(made)
    }

    /// The scores of all samples but those that are known; each rank makes those of its share.
    fn score_shared(
        &mut self,
        samples: &[reward::Sample<'_>],
        sample_ids: &[u64],
        group_size: usize,
        is_interrupted: &dyn Fn() -> bool,
        ranks: &dyn Ranks,
    ) -> anyhow::Result<Scores> {
        let early = std::mem::take(&mut self.early);
        let known = |samples: Range<usize>| early.of(&sample_ids[samples]);
        if ranks.world_size() == 1 {
            return Ok(self.rewards.score_rest(samples, known(0..samples.len()), is_interrupted)?);
        }
        // Whole groups: a function may look at all answers to a prompt.
        let groups = samples.len() / group_size.max(1);
        let start = |rank: usize| groups * rank / ranks.world_size() * group_size;
        let own = start(ranks.rank())..start(ranks.rank() + 1);
        let scores = if own.is_empty() {
            Scores::default()
        } else {
            self.rewards.score_rest(&samples[own.clone()], known(own), is_interrupted)?
        };
        let shares: Vec<Share> = gathered::in_order(vec![Share::of(scores)], ranks)?;
        Ok(Share::joined(shares, self.rewards.names().len()))
    }

    /// Rewards completions and turns rewards into group-relative advantages. `step` is for records and messages; evaluation
    /// outside of a run has none.
    pub(super) fn score(
        &mut self,
        session: &Session,
        examples: &Prompts,
        completions: &[Completion],
        group_size: usize,
        step: Option<u64>,
        surroundings: &Surroundings<'_>,
    ) -> anyhow::Result<Scored> {
        let texts: Vec<String> =
            completions.iter().map(|c| completion_text(&session.tokenizer, &c.token_ids)).collect::<Result<_, _>>()?;
        let material = material(self.settings, session, examples);
        let samples: Vec<reward::Sample<'_>> = completions
            .iter()
            .zip(&texts)
            .map(|(completion, text)| {
                material.sample(completion.group, (&completion.token_ids, text), completion.is_truncated())
            })
            .collect::<Result<_, data::Error>>()?;
        let ids: Vec<u64> = completions.iter().map(|completion| completion.sample_id).collect();
        let scores = self.score_shared(&samples, &ids, group_size, surroundings.is_interrupted, &*surroundings.ranks);
        let scores =
            scores.map_err(|error| match error.downcast_ref::<reward::Error>().map(reward::Error::reward) {
                Some(reward) => {
                    let at = step.map_or_else(String::new, |step| format!(" at step {step}"));
                    let context = format!("reward `{reward}` failed{at}");
                    error.context(context)
                }
                None => error,
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
        Ok(Scored { outcome, rewards, metrics, records, shown })
    }
}

/// A rank's scores as they travel: numbers as their bits, because JSON has no infinity.
#[derive(Serialize, Deserialize)]
struct Share {
    by_function: Vec<Vec<Option<u64>>>,
    metrics: BTreeMap<String, u64>,
    columns: BTreeMap<String, Vec<Value>>,
}

impl Share {
    fn of(scores: Scores) -> Self {
        let bits = |scores: Vec<Option<f64>>| scores.into_iter().map(|score| score.map(f64::to_bits)).collect();
        Self {
            by_function: scores.by_function.into_iter().map(bits).collect(),
            metrics: scores.metrics.into_iter().map(|(name, value)| (name, value.to_bits())).collect(),
            columns: scores.columns,
        }
    }

    fn len(&self) -> usize {
        self.by_function.first().map_or(0, Vec::len)
    }

    /// The ranks' shares as one: metrics are means over samples.
    fn joined(shares: Vec<Self>, functions: usize) -> Scores {
        let total: usize = shares.iter().map(Self::len).sum();
        let mut scores = Scores { by_function: vec![Vec::with_capacity(total); functions], ..Scores::default() };
        let mut before = 0;
        for share in shares {
            let count = share.len();
            for (all, own) in scores.by_function.iter_mut().zip(share.by_function) {
                all.extend(own.into_iter().map(|score| score.map(f64::from_bits)));
            }
            for (name, value) in share.metrics {
                let weight = count as f64 / total.max(1) as f64;
                *scores.metrics.entry(name).or_default() += f64::from_bits(value) * weight;
            }
            for (name, values) in share.columns {
                let column = scores.columns.entry(name).or_insert_with(|| vec![Value::Null; total]);
                column[before..before + count].clone_from_slice(&values[..count]);
            }
            before += count;
        }
        scores
    }
}

/// The rollout's limits: as many sequences at once as the settings say, in a cache that holds them all at full length.
pub(super) fn rollout_settings(settings: &GrpoSettings, eos: &[u32], device: &candle_core::Device) -> RolloutSettings {
    RolloutSettings {
        max_num_seqs: settings.max_num_seqs,
        max_batch_tokens: RolloutSettings::batch_tokens(device).max(settings.max_num_seqs),
        kv_cache_bytes: usize::MAX,
        max_new_tokens: settings.longest_completion(),
        eos_token_ids: eos.to_vec(),
    }
}

/// What scores are made of.
fn material<'s>(settings: &GrpoSettings, session: &'s Session, examples: &'s Prompts) -> beside::Material<'s> {
    let max_completion_length = settings.longest_completion();
    beside::Material { examples, tokenizer: &session.tokenizer, max_completion_length }
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
        examples: &Prompts,
        mask_truncated: bool,
    ) -> anyhow::Result<MicroBatch> {
        let mut builder = BatchBuilder::new();
        let mut prompts = HashMap::new();
        let (mut row_starts, mut mask) = (vec![0], Vec::new());
        for (index, sample) in samples.iter().enumerate() {
            let ids = &examples.get(sample.prompt)?.prompt_ids;
            let prompt =
                prompts.entry(sample.prompt).or_insert_with(|| builder.push(ids, prompt_key(sample.prompt))).clone();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_scores_are_joined_in_their_order() {
        let scores = |values: &[f64], metric: f64| Scores {
            by_function: vec![values.iter().map(|&v| Some(v)).collect(), vec![None; values.len()]],
            metrics: [("m".to_string(), metric)].into(),
            columns: [("c".to_string(), values.iter().map(|&v| json!(v)).collect())].into(),
        };
        let shares =
            [scores(&[1.0, f64::INFINITY], 2.0), Scores::default(), scores(&[3.0, 4.0], 4.0)].map(Share::of).into();
        let joined = Share::joined(shares, 2);
        assert_eq!(joined.by_function, [vec![Some(1.0), Some(f64::INFINITY), Some(3.0), Some(4.0)], vec![None; 4]]);
        assert!((joined.metrics["m"] - 3.0).abs() < 1e-12);
        assert_eq!(joined.columns["c"][2], json!(3.0));
    }
}
