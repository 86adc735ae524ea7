//! Drawing on the device: filters and penalties against the host's sampler, the distribution of draws, steps that follow each other.

use std::time::Instant;

use candle_core::{DType, Tensor};
use trainer::config::settings::SamplingSettings;
use trainer::device::{Queue, array, empty, matrix, synchronize};
use trainer::kernels::cuda::{
    DrawSettings, Lane, Lanes, LanesSize, PageSharing, PagedSize, decode_draw, decode_draw_workspace,
};
use trainer::rng::Stream;
use trainer::rollout::sampler::{DrawJob, Sampler, Scratch};

use crate::support::{device, random, seed, upload};

/// A cumulative probability is the host's up to this part of itself and this distance: what `decode_draw` promises.
const CUMULATIVE: (f64, f64) = (4e-7, 1e-7);

fn plain(temperature: f32) -> DrawSettings {
    DrawSettings { temperature, ..DrawSettings::default() }
}

fn penalty(repetition_penalty: f32, temperature: f32) -> DrawSettings {
    DrawSettings { repetition_penalty, ..plain(temperature) }
}

/// The host's sampler of the same settings.
fn sampler(settings: &DrawSettings) -> Sampler {
    let DrawSettings { repetition_penalty, temperature, top_k, top_p, min_p } = *settings;
    Sampler::new(&SamplingSettings {
        repetition_penalty: repetition_penalty.into(),
        temperature: temperature.into(),
        top_k,
        top_p,
        min_p,
        stop_strings: Vec::new(),
    })
    .unwrap()
}

/// What one step drew.
struct Step {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    sampling_logprobs: Vec<f32>,
    /// Of the first lane, where there are filters: the least (value, id) of top-k and top-p, and the weight of what was kept.
    border: u64,
    weight: f64,
}

/// One step of lanes over the same logits, of which all have seen the same.
fn draws(logits: &[f32], seen: &[u32], uniforms: &[f64], settings: &DrawSettings) -> Step {
    let (device, vocabulary) = (device(), logits.len());
    let queue = Queue::of(&device).unwrap();
    let count = uniforms.len();
    let size = LanesSize { lanes: count, steps: 1, pages: count, sharing: PageSharing::NONE };
    let mut lanes = Lanes::new(&queue, size, PagedSize { pages: 1, page_tokens: 16 }, vocabulary).unwrap();
    let all: Vec<f32> = (0..count).flat_map(|_| logits.iter().copied()).collect();
    let all = upload(&device, &all, (count, vocabulary), DType::F32);
    let work = Tensor::zeros(decode_draw_workspace(count, vocabulary), DType::F32, &device).unwrap();
    let each = vec![Lane { token: 0, context: 0, pages: &[0], seen }; count];
    lanes.begin(&each, count, 1, uniforms).unwrap();
    let view = lanes.view(count).unwrap();
    decode_draw(&device, matrix(&all).unwrap(), &view, settings, array(&work).unwrap()).unwrap();
    // A further step finds empty lanes.
    decode_draw(&device, matrix(&all).unwrap(), &view, settings, array(&work).unwrap()).unwrap();
    let drawn = lanes.finish(count).unwrap();
    let words: Vec<u64> =
        work.narrow(0, 0, 4).unwrap().to_vec1::<f32>().unwrap().iter().map(|x| u64::from(x.to_bits())).collect();
    Step {
        tokens: drawn.tokens,
        logprobs: drawn.logprobs,
        sampling_logprobs: drawn.sampling_logprobs,
        border: words[1] << 32 | words[0],
        weight: (words[3] << 32 | words[2]) as f64 / 2f64.powi(43),
    }
}

#[test]
#[ignore = "gpu"]
fn draws_on_the_device_follow_the_distribution() {
    let mut stream = Stream::new(seed(), "draws", 0, 0);
    for (vocabulary, temperature) in [(50, 1.0f32), (1200, 0.7), (513, 1.3)] {
        let logits: Vec<f32> = random("logits", vocabulary).iter().map(|x| 1.5 * x).collect();
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / f64::from(temperature)).exp()).collect();
        let total: f64 = weights.iter().sum();
        let (mut counts, draws_of) = (vec![0f64; vocabulary], 400);
        for _ in 0..100 {
            let uniforms: Vec<f64> = (0..draws_of).map(|_| stream.uniform()).collect();
            let Step { tokens, logprobs, .. } = draws(&logits, &[], &uniforms, &plain(temperature));
            let mut sums = weights.iter().scan(0.0, |sum, w| {
                *sum += w;
                Some(*sum)
            });
            let ends: Vec<f64> = sums.by_ref().collect();
            for ((&token, logprob), uniform) in tokens.iter().zip(logprobs).zip(uniforms) {
                let token = token as usize;
                counts[token] += 1.0;
                assert!((f64::from(logprob) - (weights[token] / total).ln()).abs() < 1e-5);
                // The inverse of the distribution function, up to rounding.
                let (before, after) = (ends[token] - weights[token], ends[token]);
                let slack = 1e-5 * total;
                assert!((before - slack..after + slack).contains(&(uniform * total)), "{uniform}: token {token}");
            }
        }
        let expected = |w: f64| w / total * 100.0 * draws_of as f64;
        let chi: f64 = counts.iter().zip(&weights).map(|(n, &w)| (n - expected(w)).powi(2) / expected(w)).sum();
        let degrees = (vocabulary - 1) as f64;
        let deviation = (chi - degrees) / (2.0 * degrees).sqrt();
        assert!(deviation.abs() < 6.0, "chi-squared {chi} with {degrees} degrees, TRAINER_TEST_SEED={}", seed());
    }
}

#[test]
#[ignore = "gpu"]
fn hard_distributions_are_drawn_from_and_unusable_ones_are_seen() {
    let mut logits = random("logits", 1100);
    logits[600] = 9.0;
    logits[1050] = 9.0;
    let Step { tokens, logprobs, .. } = draws(&logits, &[], &[0.5, 0.1], &plain(0.0));
    assert_eq!(tokens, [600, 600]);
    let total: f64 = logits.iter().map(|&l| f64::from(l - 9.0).exp()).sum();
    assert!((f64::from(logprobs[0]) + total.ln()).abs() < 1e-5);
    // All but two tokens are impossible, the first and the last chunk too.
    let mut logits = vec![f32::NEG_INFINITY; 1600];
    (logits[700], logits[701]) = (0.0, 0.0);
    let uniforms = [0.0, 0.49, 0.51, 1.0 - f64::EPSILON / 2.0];
    let Step { tokens, logprobs, .. } = draws(&logits, &[], &uniforms, &plain(1.0));
    assert_eq!(tokens, [700, 700, 701, 701]);
    assert!(logprobs.iter().all(|logprob| (f64::from(*logprob) - 0.5f64.ln()).abs() < 1e-6));
    for unusable in [f32::NAN, f32::INFINITY] {
        logits[30] = unusable;
        for settings in [plain(1.0), DrawSettings { top_p: 0.9, ..plain(1.0) }, penalty(1.2, 1.0)] {
            assert!(draws(&logits, &[3], &[0.3], &settings).logprobs[0].is_nan(), "{unusable} {settings:?}");
        }
    }
    for settings in [plain(1.0), DrawSettings { top_k: 3, ..plain(1.0) }] {
        assert!(draws(&[f32::NEG_INFINITY; 9], &[], &[0.3], &settings).logprobs[0].is_nan(), "{settings:?}");
    }
}

/// The order in which filters drop tokens.
fn order(value: f32, id: usize) -> u64 {
    let bits = (value + 0.0).to_bits();
    let key = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(key) << 32 | id as u64
}

/// Logits of many kinds: spread, peaked, flat, with ties, with tokens that are impossible.
fn families(vocabulary: usize) -> Vec<(&'static str, Vec<f32>)> {
    let normal = random("logits", vocabulary);
    let of = |change: &dyn Fn(f32) -> f32| normal.iter().map(|&x| change(x)).collect::<Vec<f32>>();
    let mut holes = of(&|x| if x < -0.5 { f32::NEG_INFINITY } else { x });
    holes[0] = 0.25;
    let mut one = vec![f32::NEG_INFINITY; vocabulary];
    one[vocabulary / 2] = 3.0;
    let mut spike = vec![-20.0; vocabulary];
    spike[vocabulary / 3] = 30.0;
    vec![
        ("normal", of(&|x| 2.0 * x)),
        ("peaked", of(&|x| 6.0 * x)),
        ("narrow", of(&|x| 1e-3 * x)),
        ("huge", of(&|x| 1e30 * x)),
        ("equal", vec![1.25; vocabulary]),
        ("zeros", of(&|x| if x > 0.0 { 0.0 } else { -0.0 })),
        ("ties", of(&|x| (2.0 * x).round() / 2.0)),
        ("holes", holes),
        ("one", one),
        ("spike", spike),
    ]
}

/// What is compared with the host, and what of it differs within rounding.
#[derive(Default)]
struct Compared {
    draws: usize,
    other_tokens: usize,
    filters: usize,
    other_kept: usize,
    wrong: Vec<String>,
}

impl Compared {
    fn check(&mut self, case: &str, logits: &[f32], seen: &[u32], uniforms: &[f64], settings: &DrawSettings) {
        let host = sampler(settings);
        let got = draws(logits, seen, uniforms, settings);
        let before = sampler(&DrawSettings { top_k: 0, top_p: 1.0, min_p: 0.0, ..*settings });
        let values = before.process(logits, seen).unwrap();
        let kept = host.process(logits, seen).unwrap();
        let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f64> = values.iter().map(|&x| f64::from(x - largest).exp()).collect();
        let is_kept = |id: usize| kept[id] > f32::NEG_INFINITY;
        // Tokens that top-p or min-p may as well drop or keep: those whose cumulative probability or whose probability lies within
        // rounding of the limit.
        let near = self.near(settings, &values, &weights);
        let slack: f64 = near.iter().map(|&id| weights[id]).sum();
        let total: f64 = (0..weights.len()).filter(|&id| is_kept(id)).map(|id| weights[id]).sum();
        let bound = 1e-6 * total + 1.001 * slack;
        if settings.is_filtered(logits.len()) {
            self.filters += 1;
            if (got.weight - total).abs() > bound {
                self.wrong
                    .push(format!("{case}: weight {} of what was kept, the host {total} ± {bound:e}", got.weight));
            }
            // min-p does not move the border.
            let others: Vec<usize> = (0..values.len())
                .filter(|&id| values[id] > f32::NEG_INFINITY && settings.min_p == 0.0)
                .filter(|&id| (order(values[id], id) >= got.border) != is_kept(id))
                .collect();
            self.other_kept += others.len();
            if let Some(id) = others.iter().find(|id| !near.contains(id)) {
                let (count, value) = (others.len(), values[*id]);
                self.wrong.push(format!(
                    "{case}: {count} tokens kept or not, as {id} of {value}: {} on the host",
                    is_kept(*id)
                ));
            }
        }
        let ends: Vec<f64> = (0..weights.len())
            .scan(0.0, |sum, id| {
                *sum += if is_kept(id) { weights[id] } else { 0.0 };
                Some(*sum)
            })
            .collect();
        let mut scratch = Scratch::default();
        for (lane, &uniform) in uniforms.iter().enumerate() {
            self.draws += 1;
            let token = got.tokens[lane] as usize;
            let want = host.draw(DrawJob { logits, seen, uniform }, &mut scratch).unwrap();
            if settings.temperature == 0.0 {
                if token != want.token as usize || (got.logprobs[lane] - want.logprob).abs() > 1e-4 {
                    self.wrong.push(format!("{case}: token {token}, on the host {}", want.token));
                }
                continue;
            }
            let start = ends[token] - if is_kept(token) { weights[token] } else { 0.0 };
            let target = uniform * total;
            let is_in_share = (start - bound..=ends[token] + bound).contains(&target);
            if !is_in_share || !(is_kept(token) || near.contains(&token)) {
                self.wrong.push(format!("{case}: {uniform} drew {token}, on the host {}", want.token));
            }
            if token != want.token as usize {
                self.other_tokens += 1;
                continue;
            }
            let tolerance = 1e-4 + (2.0 * slack / total) as f32;
            let pairs = [(got.logprobs[lane], want.logprob), (got.sampling_logprobs[lane], want.sampling_logprob)];
            // Values of 1e30 leave nothing of a logarithm.
            if pairs.iter().any(|(got, want)| (got - want).abs() > tolerance * want.abs().max(1.0) || got.is_nan()) {
                self.wrong.push(format!("{case}: log-probabilities {pairs:?} of {token}, the device's first"));
            }
        }
    }

    fn near(&self, settings: &DrawSettings, values: &[f32], weights: &[f64]) -> Vec<usize> {
        let mut ids: Vec<usize> = (0..values.len()).collect();
        ids.sort_unstable_by_key(|&id| order(values[id], id));
        let mut near = Vec::new();
        if settings.top_k > 0 && settings.top_k < values.len() {
            let threshold = values[ids[values.len() - settings.top_k]];
            ids.retain(|&id| values[id] >= threshold);
        }
        let mut sum: f64 = ids.iter().map(|&id| weights[id]).sum();
        if settings.top_p < 1.0 {
            let limit = f64::from((1.0 - settings.top_p) as f32);
            let mut cumulative = 0.0;
            let mut first = ids.len() - 1;
            for (rank, &id) in ids.iter().enumerate() {
                cumulative += weights[id] / sum;
                if (cumulative - limit).abs() <= CUMULATIVE.0 * cumulative + CUMULATIVE.1 {
                    near.push(id);
                }
                first = first.min(if cumulative > limit { rank } else { first });
            }
            ids.drain(..first);
            sum = ids.iter().map(|&id| weights[id]).sum();
        }
        if settings.min_p > 0.0 {
            let least = settings.min_p / sum;
            let slack = CUMULATIVE.0 + near.iter().map(|&id| weights[id]).sum::<f64>() / sum;
            near.extend(ids.iter().filter(|&&id| (weights[id] / sum - least).abs() <= least * slack.max(1e-6)));
        }
        near
    }
}

#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "counts for the reader")]
fn filters_and_penalties_keep_and_draw_what_the_host_does() {
    let filters = [
        (0, 0.9, 0.0),
        (0, 0.95, 0.0),
        (0, 1e-6, 0.0),
        (0, 0.999_999, 0.0),
        (1, 1.0, 0.0),
        (5, 1.0, 0.0),
        (50, 1.0, 0.0),
        (3000, 1.0, 0.0),
        (1_000_000, 1.0, 0.2),
        (0, 1.0, 0.05),
        (0, 1.0, 1e-7),
        (40, 0.9, 0.0),
        (40, 0.9, 0.1),
        (0, 0.5, 0.01),
        (300, 0.99, 0.0),
        (6000, 0.9, 0.001),
        (20, 0.8, 1.0),
        (0, 1.0, 0.0),
    ];
    let mut compared = Compared::default();
    let mut stream = Stream::new(seed(), "uniforms", 0, 0);
    for vocabulary in [1, 2, 31, 513, 1537, 5001, 20_001, 151_936, 152_064] {
        for (name, logits) in families(vocabulary) {
            for (index, (top_k, top_p, min_p)) in filters.into_iter().enumerate() {
                let repetition_penalty = [1.0, 1.3, 1.0, 0.8][(index + vocabulary) % 4];
                let temperature = [0.6, 1.0, 1.4, 0.0][index % if index % 5 == 0 { 4 } else { 3 }];
                let settings = DrawSettings { repetition_penalty, temperature, top_k, top_p, min_p };
                let mut seen: Vec<u32> = (0..40).map(|_| stream.below(vocabulary as u64) as u32).collect();
                seen.sort_unstable();
                seen.dedup();
                let mut uniforms = vec![0.0, 1.0 - f64::EPSILON / 2.0, 0.5];
                uniforms.extend((0..13).map(|_| stream.uniform()));
                compared.check(&format!("{name} {vocabulary} {settings:?}"), &logits, &seen, &uniforms, &settings);
            }
        }
    }
    let Compared { draws, other_tokens, filters, other_kept, wrong } = compared;
    println!(
        "{filters} filters: {other_kept} tokens kept or not within rounding; {draws} draws: {other_tokens} others"
    );
    assert!(
        wrong.is_empty(),
        "TRAINER_TEST_SEED={}, {} in all\n{}",
        seed(),
        wrong.len(),
        wrong[..wrong.len().min(40)].join("\n")
    );
    // Numbers that fall within rounding of a share's end are rare; 0 and the largest of them are asked for in every case.
    assert!(other_tokens * 20 < draws, "{other_tokens} of {draws} draws are others, TRAINER_TEST_SEED={}", seed());
}

#[test]
#[ignore = "gpu"]
fn draws_from_what_is_kept_follow_its_distribution() {
    let mut stream = Stream::new(seed(), "filtered draws", 0, 0);
    let settings = DrawSettings { top_k: 200, top_p: 0.9, min_p: 0.002, ..penalty(1.2, 0.8) };
    for vocabulary in [600, 6000] {
        let logits: Vec<f32> = random("logits", vocabulary).iter().map(|x| 1.5 * x).collect();
        let seen: Vec<u32> = (0..vocabulary as u32).step_by(7).collect();
        let kept = sampler(&settings).process(&logits, &seen).unwrap();
        let weights: Vec<f64> = kept.iter().map(|&x| f64::from(x).exp()).collect();
        let (total, mut counts, mut all) = (weights.iter().sum::<f64>(), vec![0f64; vocabulary], 0.0);
        for _ in 0..100 {
            let uniforms: Vec<f64> = (0..256).map(|_| stream.uniform()).collect();
            for token in draws(&logits, &seen, &uniforms, &settings).tokens {
                counts[token as usize] += 1.0;
                all += 1.0;
            }
        }
        let expected = |w: f64| w / total * all;
        let possible = || counts.iter().zip(&weights).filter(|(_, w)| **w > 0.0);
        assert_eq!(possible().map(|(n, _)| n).sum::<f64>(), all, "a token was drawn that was not kept");
        let chi: f64 = possible().map(|(n, &w)| (n - expected(w)).powi(2) / expected(w)).sum();
        let degrees = (possible().count() - 1) as f64;
        let deviation = (chi - degrees) / (2.0 * degrees).sqrt();
        assert!(deviation.abs() < 6.0, "chi-squared {chi} with {degrees} degrees, TRAINER_TEST_SEED={}", seed());
    }
}

/// Lanes with other tokens behind them, of which some are empty, over steps that follow each other.
#[test]
#[ignore = "gpu"]
fn what_is_drawn_is_seen_in_the_next_step() {
    let (device, vocabulary, steps, bucket) = (device(), 1001, 6, 4);
    let queue = Queue::of(&device).unwrap();
    let logits: Vec<f32> = (0..bucket).flat_map(|lane| random(&format!("lane {lane}"), vocabulary)).collect();
    let all = upload(&device, &logits, (bucket, vocabulary), DType::F32);
    let work = empty(&device, decode_draw_workspace(bucket, vocabulary), DType::F32).unwrap();
    let before: [Vec<u32>; 3] = [vec![1000], (0..1001).step_by(3).collect(), vec![0, 31, 32, 63, 64]];
    let mut stream = Stream::new(seed(), "seen", 0, 0);
    for settings in [
        penalty(3.0, 0.0),
        penalty(1.5, 0.3),
        DrawSettings { top_k: 4, ..penalty(4.0, 1.0) },
        DrawSettings { top_p: 0.4, min_p: 0.1, ..penalty(2.0, 0.5) },
    ] {
        let size = LanesSize { lanes: bucket, steps, pages: 2 * bucket, sharing: PageSharing::NONE };
        let mut lanes = Lanes::new(&queue, size, PagedSize { pages: 2, page_tokens: 16 }, vocabulary).unwrap();
        let each: Vec<Lane<'_>> =
            before.iter().map(|seen| Lane { token: seen[0], context: 9, pages: &[0, 1], seen }).collect();
        let uniforms: Vec<f64> = (0..steps * 3).map(|_| stream.uniform()).collect();
        // Twice: what the first round has seen is not seen in the second.
        for round in 0..2 {
            lanes.begin(&each, bucket, steps, &uniforms).unwrap();
            for _ in 0..steps {
                let view = lanes.view(bucket).unwrap();
                decode_draw(&device, matrix(&all).unwrap(), &view, &settings, array(&work).unwrap()).unwrap();
            }
            let drawn = lanes.finish(3).unwrap();
            let (host, mut scratch) = (sampler(&settings), Scratch::default());
            for (lane, before) in before.iter().enumerate() {
                let mut seen = before.clone();
                for step in 0..steps {
                    let logits = &logits[lane * vocabulary..(lane + 1) * vocabulary];
                    let job = DrawJob { logits, seen: &seen, uniform: uniforms[step * 3 + lane] };
                    let want = host.draw(job, &mut scratch).unwrap();
                    let at = step * 3 + lane;
                    let case = format!("{settings:?}, round {round}, lane {lane}, step {step}, {}", seed());
                    assert_eq!(drawn.tokens[at], want.token, "{case}");
                    assert!((drawn.logprobs[at] - want.logprob).abs() < 1e-4, "{case}");
                    assert!((drawn.sampling_logprobs[at] - want.sampling_logprob).abs() < 1e-4, "{case}");
                    if !seen.contains(&want.token) {
                        seen.push(want.token);
                    }
                }
            }
        }
    }
}

/// Microseconds of a draw, by lanes and settings.
#[test]
#[ignore = "bench"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_draw() {
    let (device, vocabulary) = (device(), 152_064);
    let queue = Queue::of(&device).unwrap();
    for (name, spread) in [("flat", 0.02f32), ("normal", 2.0), ("peaked", 5.0)] {
        let row: Vec<f32> = random("logits", vocabulary).iter().map(|x| spread * x).collect();
        for (what, settings) in [
            ("plain", plain(0.6)),
            ("top_p", DrawSettings { top_p: 0.95, ..plain(0.6) }),
            ("top_k", DrawSettings { top_k: 50, ..plain(0.6) }),
            ("min_p", DrawSettings { min_p: 0.05, ..plain(0.6) }),
            ("all", DrawSettings { top_k: 50, top_p: 0.95, min_p: 0.05, ..penalty(1.1, 0.6) }),
        ] {
            let mut line = format!("{name:7} {what:6}");
            for count in [1, 8, 64, 132, 256] {
                let (rounds, steps) = (10, 16);
                let size = LanesSize { lanes: count, steps, pages: 2 * count, sharing: PageSharing::NONE };
                let mut lanes = Lanes::new(&queue, size, PagedSize { pages: 2, page_tokens: 16 }, vocabulary).unwrap();
                let all: Vec<f32> = (0..count).flat_map(|_| row.iter().copied()).collect();
                let all = upload(&device, &all, (count, vocabulary), DType::F32);
                let work = empty(&device, decode_draw_workspace(count, vocabulary), DType::F32).unwrap();
                let each = vec![Lane { token: 1, context: 0, pages: &[0, 1], seen: &[1, 2] }; count];
                let uniforms = vec![0.4; count * steps];
                let mut secs = f64::INFINITY;
                for _ in 0..rounds {
                    lanes.begin(&each, count, steps, &uniforms).unwrap();
                    let view = lanes.view(count).unwrap();
                    synchronize(&device).unwrap();
                    let started = Instant::now();
                    for _ in 0..steps {
                        decode_draw(&device, matrix(&all).unwrap(), &view, &settings, array(&work).unwrap()).unwrap();
                    }
                    synchronize(&device).unwrap();
                    secs = secs.min(started.elapsed().as_secs_f64() / steps as f64);
                }
                line += &format!("  {count}: {:.1} us", secs * 1e6);
            }
            println!("{line}");
        }
    }
}
