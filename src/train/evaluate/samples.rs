//! A model by its completions: rewards, pass@k, majority votes, lengths.

use serde_json::{Map, Value, json};

use super::metric::Metric;
use super::statistics::pass_at_k;
use super::votes::majority;
use super::{Measured, Speed};
use crate::config::settings::GrpoSettings;
use crate::data::{Dataset, PromptExample};
use crate::reward::{AnswerReader, Rewards};
use crate::rollout::{Completion, Request};
use crate::train::generation::{Generator, Scored, Surroundings};
use crate::train::grpo::{EVALUATION_KEY, check_prompts, close_length};
use crate::train::material::Making;
use crate::train::sample::with_all_there;
use crate::train::session::Session;

/// Samples completions of each prompt of `rows`, rewards them and returns what that comes to. The rewards come back for the next
/// model.
///
/// A completion's random numbers are keyed by the seed, the prompt's place among the rows and the sample's number: they are the
/// same for every model, however many prompts and samples there are.
///
/// # Errors
/// If a row is unusable, the model fails, or a reward does.
pub(super) fn measure(
    settings: &GrpoSettings,
    ks: &[usize],
    session: &mut Session,
    (rows, split): (&Dataset, &str),
    rewards: Rewards,
    (surroundings, ready): (&Surroundings<'_>, &dyn Fn()),
) -> anyhow::Result<(Measured, Rewards)> {
    let (prompts, _) = Making::of(session.text()).prompts(settings, rows)?;
    check_prompts(settings, session, split, &prompts)?;
    if prompts.summary().is_conversational {
        session.adopt_end_of_turn(settings.model.eos_token.is_some())?;
    }
    ready();
    let settings = &close_length(settings, session, [Some(&prompts), None]);
    let examples: Vec<&PromptExample> = (0..prompts.len()).map(|at| prompts.get(at)).collect::<Result<_, _>>()?;
    let samples = settings.num_generations_eval;
    let mut generator = Generator::new(settings, session, rewards)?;
    generator.show_progress(0, 0);
    let requests = requests(&examples, samples);
    let completions = with_all_there(settings, session, |session| {
        generator.complete(session, &prompts, &requests, EVALUATION_KEY, &settings.sampling, surroundings)
    })?;
    let statistics = generator.statistics();
    let speed = Speed {
        tokens: statistics.generated_tokens,
        secs: statistics.prefill_secs + statistics.decode_secs + statistics.sampling_secs,
    };
    generator.make_room(session);
    let scored = generator.score(session, &prompts, &completions, samples, None, surroundings)?;
    let names = generator.rewards().names().to_vec();
    let table =
        Table { settings, ks, names: &names, samples, prompts: &examples, completions: &completions, scored: &scored };
    let metrics = table.metrics();
    let records = table.records();
    let indices = examples.iter().map(|prompt| prompt.index).collect();
    let measured = Measured { metrics, indices, targets: Vec::new(), records, speed };
    Ok((measured, generator.into_rewards()))
}

/// So many requests of each prompt.
fn requests(prompts: &[&PromptExample], samples: usize) -> Vec<Request> {
    let of_prompt = |(group, prompt): (usize, &&PromptExample)| {
        let (first, prompt_ids) = ((prompt.index as u64) << 32, prompt.prompt_ids.clone());
        (0..samples as u64).map(move |sample| Request {
            sample_id: first | sample,
            prompt_ids: prompt_ids.clone(),
            group,
        })
    };
    prompts.iter().enumerate().flat_map(of_prompt).collect()
}

/// The completions of all prompts, with their scores.
struct Table<'a> {
    settings: &'a GrpoSettings,
    ks: &'a [usize],
    /// Of the reward functions.
    names: &'a [String],
    /// Per prompt.
    samples: usize,
    prompts: &'a [&'a PromptExample],
    completions: &'a [Completion],
    scored: &'a Scored,
}

impl Table<'_> {
    /// The scores of one function, by sample.
    fn scores(&self, function: usize) -> Vec<Option<f64>> {
        let own = self.scored.rewards.iter().skip(function).step_by(self.names.len());
        own.map(|&score| (!score.is_nan()).then_some(score)).collect()
    }

    fn metrics(&self) -> Vec<Metric> {
        let totals: Vec<Option<f64>> =
            self.scored.outcome.rewards.iter().map(|&total| (!total.is_nan()).then_some(total)).collect();
        let mut metrics = vec![self.mean_of("reward", &totals, false)];
        for (function, name) in self.names.iter().enumerate() {
            let scores = self.scores(function);
            let is_binary = scores.iter().flatten().all(|&score| score == 0.0 || score == 1.0);
            metrics.push(self.mean_of(&format!("rewards/{name}/mean"), &scores, is_binary));
            if is_binary && scores.iter().any(Option::is_some) {
                metrics.extend(self.ks.iter().map(|&k| self.pass(name, &scores, k)));
                metrics.extend(self.majorities(function, name, &scores));
            }
        }
        let lengths = self.completions.iter().map(|c| Some(c.token_ids.len() as f64)).collect::<Vec<_>>();
        let clipped = self.completions.iter().map(|c| Some(f64::from(u8::from(c.is_truncated())))).collect::<Vec<_>>();
        metrics.push(self.mean_of("completions/mean_length", &lengths, false));
        metrics.push(self.mean_of("completions/clipped_ratio", &clipped, true));
        metrics
    }

    /// The mean over all samples that have a value.
    fn mean_of(&self, name: &str, values: &[Option<f64>], is_share: bool) -> Metric {
        let groups = || values.chunks(self.samples);
        let sums: Vec<f64> = groups().map(|group| group.iter().flatten().sum()).collect();
        let counts: Vec<f64> = groups().map(|group| group.iter().flatten().count() as f64).collect();
        if is_share { Metric::share(name, &sums, &counts) } else { Metric::ratio(name, &sums, &counts) }
    }

    /// pass@k; prompts with fewer scored samples than `k` are left out.
    fn pass(&self, name: &str, scores: &[Option<f64>], k: usize) -> Metric {
        let of_prompt = |group: &[Option<f64>]| {
            let scored = group.iter().flatten().count();
            let right = group.iter().flatten().filter(|&&score| score == 1.0).count();
            (scored >= k).then(|| pass_at_k(scored, right, k))
        };
        let passed: Vec<Option<f64>> = scores.chunks(self.samples).map(of_prompt).collect();
        Metric::mean_share(format!("rewards/{name}/pass@{k}"), &passed, self.samples)
    }

    /// majority@k of a reward that compares final answers, over the first `k` samples of each prompt.
    fn majorities(&self, function: usize, name: &str, scores: &[Option<f64>]) -> Vec<Metric> {
        let Some(reader) = AnswerReader::of(&self.settings.reward_funcs[function]) else { return Vec::new() };
        let read = |(completion, record): (&Completion, &Value)| {
            let text = record["completion"].as_str().unwrap_or_default();
            reader.read(&self.prompts[completion.group].prompt_text, text)
        };
        let answers: Vec<_> = self.completions.iter().zip(&self.scored.records).map(read).collect();
        let vote = |k: usize| {
            let groups = answers.chunks(self.samples).zip(scores.chunks(self.samples));
            let won: Vec<Option<f64>> = groups.map(|(answers, scores)| majority(&answers[..k], &scores[..k])).collect();
            Metric::mean_share(format!("rewards/{name}/majority@{k}"), &won, 1)
        };
        self.ks.iter().filter(|&&k| k > 1).map(|&k| vote(k)).collect()
    }

    /// One line of completions.jsonl a completion.
    fn records(&self) -> Vec<Value> {
        let record = |(place, record): (usize, &Value)| {
            let mut record = record.clone();
            if let Some(fields) = record.as_object_mut() {
                // Nothing is trained on: there is no step, and no advantage over the group.
                fields.retain(|name, _| name != "step" && name != "advantage");
                fields.insert("prompt_index".into(), json!(self.prompts[place / self.samples].index));
                fields.insert("sample".into(), json!(place % self.samples));
            }
            record
        };
        self.scored.records.iter().enumerate().map(record).collect()
    }
}

/// The sampling of the completions and what they are rewarded by, for the record; `names` are those of the reward functions.
pub(super) fn settings_to_json(settings: &GrpoSettings, ks: &[usize], names: &[String]) -> Map<String, Value> {
    let sampling = &settings.sampling;
    let weights: Map<String, Value> =
        names.iter().cloned().zip(settings.reward_weights.iter().map(|&weight| json!(weight))).collect();
    [
        ("num_samples", json!(settings.num_generations_eval)),
        ("k", json!(ks)),
        ("temperature", json!(sampling.temperature)),
        ("top_k", json!(sampling.top_k)),
        ("top_p", json!(sampling.top_p)),
        ("min_p", json!(sampling.min_p)),
        ("repetition_penalty", json!(sampling.repetition_penalty)),
        ("max_completion_length", json!(settings.max_completion_length)),
        ("reward_weights", Value::Object(weights)),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_string(), value))
    .collect()
}
