use super::*;
use crate::algo::GrpoBatch;
use crate::config::settings::VespoSettings;
use crate::rng::Stream;

const LOSS_TYPES: [GrpoLossType; 8] = [
    GrpoLossType::Grpo,
    GrpoLossType::Bnpo,
    GrpoLossType::DrGrpo,
    GrpoLossType::Dapo,
    GrpoLossType::Cispo,
    GrpoLossType::Sapo,
    GrpoLossType::Luspo,
    GrpoLossType::Vespo,
];
const LEVELS: [ImportanceSamplingLevel; 2] = [ImportanceSamplingLevel::Token, ImportanceSamplingLevel::Sequence];

/// Step of the differences. Log-probabilities of the samples are multiples of a quarter of it, so that moving one (or
/// two by the same step) rounds nothing.
const STEP: f32 = 1.0 / 1024.0;
/// Share of the largest gradient by which central differences may be off: their error is of the order of `STEP^2`.
const DIFFERENCE_TOLERANCE: f64 = 2e-5;

fn on_grid(value: f32) -> f32 {
    (value / STEP * 4.0).round() * STEP / 4.0
}

pub(in crate::algo) fn settings() -> GrpoLossSettings {
    GrpoLossSettings {
        loss_type: GrpoLossType::Dapo,
        importance_sampling_level: ImportanceSamplingLevel::Token,
        beta: 0.0,
        use_bias_correction_kl: true,
        epsilon: 0.2,
        epsilon_high: 0.2,
        delta: None,
        top_entropy_quantile: 1.0,
        entropy_coef: 0.0,
        is_entropy_adaptive: false,
        off_policy_mask_threshold: None,
        sapo_temperature_neg: 1.05,
        sapo_temperature_pos: 1.0,
        vespo: VespoSettings { k_pos: 2.0, lambda_pos: 3.0, k_neg: 3.0, lambda_neg: 2.0 },
        max_completion_length: 16,
    }
}

/// A random micro-batch that owns its arrays; row 2 is empty, row 3 is masked altogether.
#[derive(Clone)]
struct Sample {
    row_starts: Vec<usize>,
    logprobs: Vec<f32>,
    old: Vec<f32>,
    reference: Vec<f32>,
    sampling: Vec<f32>,
    entropies: Vec<f32>,
    mask: Vec<u8>,
    tool_mask: Vec<u8>,
    advantages: Vec<f32>,
    token_ratio: Vec<f32>,
    row_ratio: Vec<f32>,
    batch: GrpoBatch,
}

impl Sample {
    fn new(seed: u64) -> Self {
        let mut stream = Stream::new(seed, "grpo loss", 0, 0);
        let row_starts = vec![0, 7, 12, 12, 16, 22];
        let tokens = 22;
        let logprobs: Vec<f32> = (0..tokens).map(|_| on_grid(-0.2 - 2.0 * stream.uniform() as f32)).collect();
        let mut near = |spread: f64| -> Vec<f32> {
            logprobs.iter().map(|l| on_grid(l + (spread * stream.normal()) as f32)).collect()
        };
        let (old, reference, sampling) = (near(0.25), near(0.5), near(0.3));
        let mut positive = || -> Vec<f32> { (0..tokens).map(|_| 0.2 + stream.uniform() as f32).collect() };
        let (entropies, token_ratio) = (positive(), positive());
        let mut mask: Vec<u8> = (0..tokens).map(|_| u8::from(stream.uniform() < 0.85)).collect();
        mask[12..16].fill(0);
        let tool_mask = (0..tokens).map(|_| u8::from(stream.uniform() < 0.9)).collect();
        Self {
            row_starts,
            logprobs,
            old,
            reference,
            sampling,
            entropies,
            mask,
            tool_mask,
            advantages: (0..5).map(|_| stream.normal() as f32).collect(),
            token_ratio,
            row_ratio: (0..5).map(|_| 0.5 + stream.uniform() as f32).collect(),
            batch: GrpoBatch {
                num_items_in_batch: 40,
                num_processes: 2,
                gradient_accumulation_steps: 3,
                steps_per_generation: 4,
                is_training: true,
            },
        }
    }

    fn inputs(&self) -> GrpoInputs<'_> {
        GrpoInputs {
            row_starts: &self.row_starts,
            logprobs: &self.logprobs,
            old_logprobs: Some(&self.old),
            ref_logprobs: Some(&self.reference),
            sampling_logprobs: Some(&self.sampling),
            entropies: Some(&self.entropies),
            mask: &self.mask,
            tool_mask: Some(&self.tool_mask),
            advantages: &self.advantages,
            importance_ratio: Some(ImportanceRatio::Token(&self.token_ratio)),
            entropy_threshold: None,
            batch: self.batch,
        }
    }

    /// This sample with token `token` of `logprobs` moved by `step`, and of `old` as well where the ratio is to stay.
    fn moved(&self, token: usize, step: f32, keeps_ratio: bool) -> Self {
        let mut moved = self.clone();
        moved.logprobs[token] += step;
        if keeps_ratio {
            moved.old[token] += step;
        }
        moved
    }
}

/// The gradient by central differences, `None` for a token where the loss has a corner within the step.
fn differences(sample: &Sample, keeps_ratio: bool, loss: &dyn Fn(&Sample) -> f64) -> Vec<Option<f64>> {
    (0..sample.logprobs.len())
        .map(|token| {
            let slope = |step: f32| {
                let (up, down) = (sample.moved(token, step, keeps_ratio), sample.moved(token, -step, keeps_ratio));
                let width = f64::from(up.logprobs[token]) - f64::from(down.logprobs[token]);
                (loss(&up) - loss(&down)) / width
            };
            // Two widths disagree where a corner lies between them.
            let (wide, narrow) = (slope(STEP), slope(STEP / 2.0));
            let is_smooth = (wide - narrow).abs() <= 1e-4 * narrow.abs() + 1e-7;
            is_smooth.then_some(narrow)
        })
        .collect()
}

fn assert_gradient(gradient: &[f64], expected: &[Option<f64>], case: &str) {
    let largest = gradient.iter().fold(1e-6f64, |most, g| most.max(g.abs()));
    let mut compared = 0;
    for (token, (got, expected)) in gradient.iter().zip(expected).enumerate() {
        let Some(expected) = expected else { continue };
        compared += 1;
        let error = (got - expected).abs() / largest;
        assert!(error < DIFFERENCE_TOLERANCE, "{case}: token {token}: {got:.6e}, differences {expected:.6e}");
    }
    assert!(compared * 2 > gradient.len(), "{case}: only {compared} tokens without a corner");
}

fn wide(gradient: &[f32]) -> Vec<f64> {
    gradient.iter().map(|&g| f64::from(g)).collect()
}

/// Every combination of the options that change the formula.
fn variants() -> Vec<GrpoLossSettings> {
    let mut variants = Vec::new();
    for loss_type in LOSS_TYPES {
        for importance_sampling_level in LEVELS {
            for (delta, top_entropy_quantile, off_policy_mask_threshold) in
                [(None, 1.0, None), (Some(1.1), 1.0, Some(0.02)), (Some(4.0), 0.4, None)]
            {
                for beta in [0.0, 0.1] {
                    variants.push(GrpoLossSettings {
                        loss_type,
                        importance_sampling_level,
                        delta,
                        beta,
                        top_entropy_quantile,
                        off_policy_mask_threshold,
                        epsilon_high: if loss_type == GrpoLossType::Cispo { 1.1 } else { 0.28 },
                        use_bias_correction_kl: false,
                        ..settings()
                    });
                }
            }
        }
    }
    variants
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (number, settings) in variants().into_iter().enumerate() {
        let sample = Sample::new(number as u64);
        // The weights of these two pass no gradient: move old_logprobs along, so that the ratio stays.
        let keeps_ratio = matches!(settings.loss_type, GrpoLossType::Cispo | GrpoLossType::Vespo);
        let loss = |sample: &Sample| grpo_loss(&sample.inputs(), &settings).unwrap().loss;
        let gradient = grpo_loss(&sample.inputs(), &settings).unwrap().d_logprobs;
        assert_gradient(&wide(&gradient), &differences(&sample, keeps_ratio, &loss), &format!("{settings:?}"));
    }
}

#[test]
fn the_gradient_of_the_bias_corrected_kl_flows_through_the_ratio() {
    for loss_type in LOSS_TYPES {
        for importance_sampling_level in LEVELS {
            let with = GrpoLossSettings { loss_type, importance_sampling_level, beta: 0.1, ..settings() };
            let without = GrpoLossSettings { beta: 0.0, ..with.clone() };
            let sample = Sample::new(77);
            let kl = |sample: &Sample| {
                let inputs = sample.inputs();
                grpo_loss(&inputs, &with).unwrap().loss - grpo_loss(&inputs, &without).unwrap().loss
            };
            let inputs = sample.inputs();
            let all = wide(&grpo_loss(&inputs, &with).unwrap().d_logprobs);
            let policy = wide(&grpo_loss(&inputs, &without).unwrap().d_logprobs);
            let gradient: Vec<f64> = all.iter().zip(&policy).map(|(a, p)| a - p).collect();
            assert_gradient(&gradient, &differences(&sample, false, &kl), &format!("{with:?}"));
        }
    }
}

#[test]
fn the_entropy_bonus_has_the_gradient_of_finite_differences() {
    for top_entropy_quantile in [1.0, 0.5] {
        let settings = GrpoLossSettings { entropy_coef: 0.3, top_entropy_quantile, ..settings() };
        let sample = Sample::new(5);
        // A threshold from elsewhere, so that a step does not move it.
        let loss = |sample: &Sample| {
            let inputs = GrpoInputs { entropy_threshold: Some(0.71), ..sample.inputs() };
            grpo_loss(&inputs, &settings).unwrap()
        };
        let output = loss(&sample);
        let slopes = output.d_entropies.clone().unwrap();
        let metrics = output.metrics.values();
        assert!((metrics["entropy_coef"] - 0.3).abs() < 1e-12 && metrics.contains_key("policy_loss"));
        assert!(slopes.iter().any(|s| *s < 0.0));
        for token in 0..sample.entropies.len() {
            let mut moved = sample.clone();
            moved.entropies[token] += 1e-4;
            let width = f64::from(moved.entropies[token]) - f64::from(sample.entropies[token]);
            let expected = (loss(&moved).loss - output.loss) / width;
            assert!((f64::from(slopes[token]) - expected).abs() < 1e-6, "token {token}");
        }
    }
    assert!(grpo_loss(&Sample::new(5).inputs(), &settings()).unwrap().d_entropies.is_none());
}

#[test]
fn without_old_logprobs_the_ratio_is_one_and_still_has_its_gradient() {
    for settings in variants() {
        let mut sample = Sample::new(9);
        sample.old = sample.logprobs.clone();
        let off = grpo_loss(&sample.inputs(), &settings).unwrap();
        let on = grpo_loss(&GrpoInputs { old_logprobs: None, ..sample.inputs() }, &settings).unwrap();
        assert_eq!(off, on, "{settings:?}");
        assert!(on.d_logprobs.iter().any(|g| *g != 0.0));
    }
}

/// The sample's rows `rows` as a micro-batch of its own.
fn part(sample: &Sample, rows: std::ops::Range<usize>) -> Sample {
    let tokens = sample.row_starts[rows.start]..sample.row_starts[rows.end];
    let starts = &sample.row_starts[rows.start..=rows.end];
    Sample {
        row_starts: starts.iter().map(|s| s - tokens.start).collect(),
        logprobs: sample.logprobs[tokens.clone()].to_vec(),
        old: sample.old[tokens.clone()].to_vec(),
        reference: sample.reference[tokens.clone()].to_vec(),
        sampling: sample.sampling[tokens.clone()].to_vec(),
        entropies: sample.entropies[tokens.clone()].to_vec(),
        mask: sample.mask[tokens.clone()].to_vec(),
        tool_mask: sample.tool_mask[tokens.clone()].to_vec(),
        advantages: sample.advantages[rows.clone()].to_vec(),
        token_ratio: sample.token_ratio[tokens].to_vec(),
        row_ratio: sample.row_ratio[rows].to_vec(),
        batch: sample.batch,
    }
}

#[test]
fn cutting_a_step_into_micro_batches_changes_neither_the_loss_nor_the_gradient() {
    for settings in variants() {
        // `bnpo` is the one whose normaliser is the micro-batch's own.
        if settings.loss_type == GrpoLossType::Bnpo {
            continue;
        }
        let settings = GrpoLossSettings { top_entropy_quantile: 1.0, ..settings };
        let mut whole = part(&Sample::new(21), 0..4);
        let one = GrpoBatch { gradient_accumulation_steps: 1, steps_per_generation: 1, ..whole.batch };
        let two = GrpoBatch { gradient_accumulation_steps: 2, steps_per_generation: 2, ..whole.batch };
        whole.batch = one;
        let expected = grpo_loss(&whole.inputs(), &settings).unwrap();
        let (mut loss, mut gradient) = (0.0, Vec::new());
        for rows in [0..2, 2..4] {
            let half = Sample { batch: two, ..part(&whole, rows) };
            let output = grpo_loss(&half.inputs(), &settings).unwrap();
            loss += output.loss;
            gradient.extend(output.d_logprobs);
        }
        assert!((loss - expected.loss).abs() < 1e-12, "{settings:?}");
        for (got, expected) in gradient.iter().zip(&expected.d_logprobs) {
            assert!((got - expected).abs() <= 1e-6 * expected.abs(), "{settings:?}");
        }
    }
}

#[test]
fn a_step_of_half_a_generation_batch_has_the_scale_of_a_whole_one() {
    // Issue 5619 of TRL: with several optimizer steps per generation batch the token-normalised losses came out small.
    for loss_type in [GrpoLossType::Dapo, GrpoLossType::Cispo, GrpoLossType::Vespo] {
        let settings = GrpoLossSettings { loss_type, ..settings() };
        let mut sample = Sample::new(3);
        sample.batch = GrpoBatch { gradient_accumulation_steps: 4, steps_per_generation: 4, ..sample.batch };
        let whole = grpo_loss(&sample.inputs(), &settings).unwrap().loss;
        sample.batch = GrpoBatch { gradient_accumulation_steps: 2, ..sample.batch };
        let half = grpo_loss(&sample.inputs(), &settings).unwrap().loss;
        assert!((half - 2.0 * whole).abs() < 1e-12, "{loss_type}");
    }
}

#[test]
fn what_is_masked_is_never_read() {
    for settings in variants() {
        let mut sample = Sample::new(13);
        let hidden: Vec<usize> =
            (0..sample.mask.len()).filter(|&t| sample.mask[t] * sample.tool_mask[t] == 0).collect();
        let inputs =
            |sample: &Sample| grpo_loss(&GrpoInputs { importance_ratio: None, ..sample.inputs() }, &settings).unwrap();
        let expected = inputs(&sample);
        for &token in &hidden {
            for values in [&mut sample.logprobs, &mut sample.old, &mut sample.reference, &mut sample.entropies] {
                values[token] = f32::NAN;
            }
            assert!(expected.d_logprobs[token].abs() < 1e-30);
        }
        assert_eq!(inputs(&sample), expected, "{settings:?}");
    }
}

#[test]
fn a_correction_per_row_is_the_same_correction_on_each_of_its_tokens() {
    for loss_type in LOSS_TYPES.into_iter().filter(|&l| l != GrpoLossType::Vespo) {
        let settings = GrpoLossSettings { loss_type, ..settings() };
        let mut sample = Sample::new(31);
        for row in 0..5 {
            let ratio = sample.row_ratio[row];
            sample.token_ratio[sample.row_starts[row]..sample.row_starts[row + 1]].fill(ratio);
        }
        let per_token = grpo_loss(&sample.inputs(), &settings).unwrap();
        let ratios = Some(ImportanceRatio::Sequence(&sample.row_ratio));
        let per_row = grpo_loss(&GrpoInputs { importance_ratio: ratios, ..sample.inputs() }, &settings).unwrap();
        assert_eq!(per_token, per_row, "{loss_type}");
    }
}

#[test]
fn a_micro_batch_without_any_token_has_loss_zero() {
    for settings in variants() {
        let mut sample = Sample::new(1);
        sample.mask.fill(0);
        let output = grpo_loss(&sample.inputs(), &settings).unwrap();
        assert!(output.loss.abs() < 1e-30 && output.d_logprobs.iter().all(|g| *g == 0.0), "{settings:?}");
        // At token level no row has a share of clipped tokens, and the extremes over rows do not exist.
        let extremes = ["clip_ratio/low_min", "clip_ratio/high_max"];
        for (name, value) in output.metrics.values() {
            let is_extreme = extremes.contains(&name.as_str());
            let is_token_level = settings.importance_sampling_level == ImportanceSamplingLevel::Token;
            assert_eq!(value.is_nan(), is_extreme && is_token_level, "{name} {settings:?}");
        }
    }
}

#[test]
fn metrics_of_ranks_join_into_those_of_the_whole() {
    for settings in variants() {
        let settings = GrpoLossSettings { top_entropy_quantile: 1.0, ..settings };
        let whole = Sample::new(17);
        let mut joined = grpo_loss(&part(&whole, 0..2).inputs(), &settings).unwrap().metrics;
        joined.merge(&grpo_loss(&part(&whole, 2..5).inputs(), &settings).unwrap().metrics);
        let expected = grpo_loss(&whole.inputs(), &settings).unwrap().metrics;
        for (name, value) in expected.values() {
            assert!((joined.values()[&name] - value).abs() < 1e-9, "{name} {settings:?}");
        }
    }
}

#[test]
fn inputs_that_do_not_fit_name_what_is_wrong() {
    let sample = Sample::new(1);
    let inputs = sample.inputs();
    let short = &sample.old[..5];
    let message =
        |inputs: &GrpoInputs<'_>, settings: &GrpoLossSettings| grpo_loss(inputs, settings).unwrap_err().to_string();
    let text = message(&GrpoInputs { old_logprobs: Some(short), ..inputs }, &settings());
    assert_eq!(text, "GRPO loss: `old_logprobs` has 5 elements, expected 22");
    let text = message(&GrpoInputs { advantages: &[1.0], ..inputs }, &settings());
    assert!(text.contains("`advantages` has 1"), "{text}");
    let text = message(&GrpoInputs { ref_logprobs: None, ..inputs }, &GrpoLossSettings { beta: 0.1, ..settings() });
    assert!(text.contains("`beta` = 0.1") && text.contains("`ref_logprobs`"), "{text}");
    let needy = GrpoLossSettings { entropy_coef: 0.1, ..settings() };
    let text = message(&GrpoInputs { entropies: None, ..inputs }, &needy);
    assert!(text.contains("`entropies`"), "{text}");
    let text = message(&inputs, &GrpoLossSettings { sapo_temperature_neg: 0.0, ..settings() });
    assert!(text.contains("`sapo_temperature_neg` is 0"), "{text}");
    let none = GrpoBatch { num_processes: 0, ..sample.batch };
    let text = message(&GrpoInputs { batch: none, ..inputs }, &settings());
    assert!(text.contains("`num_processes` is 0"), "{text}");
    let text = message(&GrpoInputs { row_starts: &[0, 30], ..inputs }, &settings());
    assert!(text.contains("ends with 30"), "{text}");
}
