//! A tiny real attention model: what it says next depends on every cached key and value, so a wrong page, a page written
//! to by somebody else or a missing token changes what it generates.

use candle_core::{DType, Device, Tensor};

use crate::config::settings::SamplingSettings;
use crate::rng::Stream;
use crate::rollout::decode_model::{DrawSettings, Drawn, Lane};
use crate::rollout::sampler::{Draw, DrawJob, Sampler, Scratch};
use crate::rollout::{DecodeModel, Error, KvCache, KvShape, Span, StepBatch};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const HIDDEN: usize = HEADS * HEAD_DIM;
const LAYERS: usize = 2;

struct Layer {
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
}

pub(super) struct AttentionModel {
    vocab_size: usize,
    pub(super) max_positions: usize,
    /// Where the model breaks.
    pub(super) poisoned_position: Option<u32>,
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    /// Sequences that it wants at a time.
    pub(super) most_lanes: usize,
    /// Tokens that it draws itself for each sequence at a time.
    pub(super) most_steps: usize,
    /// Times that it draws before it has no memory for more.
    pub(super) most_draws: usize,
    /// Times that it drew.
    pub(super) draws: usize,
    /// Tokens of each step so far.
    pub(super) step_tokens: Vec<usize>,
    /// Most sequences in a step so far.
    pub(super) most_spans: usize,
}

impl AttentionModel {
    pub(super) fn new(vocab_size: usize) -> Self {
        let weights = |name: &str, len: usize, scale: f64, item: usize| -> Vec<f32> {
            let mut stream = Stream::new(3, name, 0, item as u64);
            (0..len).map(|_| (scale * stream.normal()) as f32).collect()
        };
        let scale = 1.5 / (HIDDEN as f64).sqrt();
        let kv = KV_HEADS * HEAD_DIM * HIDDEN;
        Self {
            vocab_size,
            max_positions: 10_000,
            poisoned_position: None,
            embedding: weights("embedding", vocab_size * HIDDEN, 0.5, 0),
            layers: (0..LAYERS)
                .map(|layer| Layer {
                    query: weights("query", HIDDEN * HIDDEN, scale, layer),
                    key: weights("key", kv, scale, layer),
                    value: weights("value", kv, scale, layer),
                })
                .collect(),
            most_lanes: usize::MAX,
            most_steps: 0,
            most_draws: usize::MAX,
            draws: 0,
            step_tokens: Vec::new(),
            most_spans: 0,
        }
    }

    fn embed(&self, token: u32, position: u32) -> Vec<f32> {
        let row = &self.embedding[token as usize * HIDDEN..][..HIDDEN];
        if self.poisoned_position == Some(position) {
            return vec![f32::NAN; HIDDEN];
        }
        row.iter().enumerate().map(|(dim, x)| x + (position as f32 * 0.37 + dim as f32 * 0.61).sin()).collect()
    }

    fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        multiply(&self.embedding, hidden).iter().map(|x| 0.7 * x).collect()
    }

    /// The logits after `tokens`, computed from nothing, without cache or pages, in f64.
    pub(super) fn logits_without_cache(&self, tokens: &[u32]) -> Vec<f32> {
        let mut rows: Vec<Vec<f32>> = tokens.iter().zip(0..).map(|(&t, p)| self.embed(t, p)).collect();
        for layer in &self.layers {
            let keys: Vec<_> = rows.iter().map(|row| multiply(&layer.key, row)).collect();
            let values: Vec<_> = rows.iter().map(|row| multiply(&layer.value, row)).collect();
            for (index, row) in rows.iter_mut().enumerate() {
                let query = multiply(&layer.query, row);
                let mut attended = Vec::new();
                for head in 0..HEADS {
                    let kv = head / (HEADS / KV_HEADS) * HEAD_DIM;
                    let query = &query[head * HEAD_DIM..][..HEAD_DIM];
                    let weights: Vec<f64> = keys[..=index]
                        .iter()
                        .map(|key| {
                            let score: f32 = query.iter().zip(&key[kv..]).map(|(q, k)| q * k).sum();
                            f64::from(score * attention_scale()).exp()
                        })
                        .collect();
                    let sum: f64 = weights.iter().sum();
                    attended.extend((0..HEAD_DIM).map(|dim| {
                        let mixed = weights.iter().zip(&values).map(|(w, v)| w / sum * f64::from(v[kv + dim]));
                        mixed.sum::<f64>() as f32
                    }));
                }
                *row = residual(row, &attended);
            }
        }
        self.logits(&rows[rows.len() - 1])
    }
}

impl DecodeModel for AttentionModel {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn kv_shape(&self) -> KvShape {
        KvShape { layers: LAYERS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, dtype: DType::F32 }
    }

    fn max_positions(&self) -> usize {
        self.max_positions
    }

    fn most_lanes(&self) -> usize {
        self.most_lanes
    }

    fn most_steps(&self) -> usize {
        self.most_steps
    }

    fn prepare_draw(
        &mut self,
        lanes: &[Lane<'_>],
        steps: usize,
        _: &DrawSettings,
        _: &mut KvCache,
    ) -> Result<bool, Error> {
        assert!(!lanes.is_empty() && steps <= self.most_steps);
        if self.draws == self.most_draws {
            self.most_steps = 0;
        }
        Ok(self.most_steps > 0)
    }

    fn draw(
        &mut self,
        lanes: &[Lane<'_>],
        steps: usize,
        uniforms: &[f64],
        settings: &DrawSettings,
        cache: &mut KvCache,
    ) -> Result<Drawn, Error> {
        assert!((1..=self.most_steps).contains(&steps) && uniforms.len() == steps * lanes.len());
        self.draws += 1;
        let DrawSettings { repetition_penalty, temperature, top_k, top_p, min_p } = *settings;
        let settings = SamplingSettings {
            repetition_penalty: repetition_penalty.into(),
            temperature: temperature.into(),
            top_k,
            top_p,
            min_p,
            stop_strings: Vec::new(),
        };
        let mut seen: Vec<Vec<u32>> = lanes.iter().map(|lane| lane.seen.to_vec()).collect();
        let (sampler, mut scratch) = (Sampler::new(&settings)?, Scratch::default());
        let mut newest: Vec<u32> = lanes.iter().map(|lane| lane.token).collect();
        let mut drawn = Drawn::default();
        for step in 0..steps {
            let mut batch = StepBatch::default();
            for (index, lane) in lanes.iter().enumerate() {
                batch.tokens.push(newest[index]);
                batch.positions.push((lane.context + step) as u32);
                let (pages, context) = (lane.pages.to_vec(), lane.context + step);
                batch.spans.push(Span { tokens: index..index + 1, pages, context });
                batch.logit_rows.push(index);
            }
            let logits = self.step(&batch, cache)?.to_vec2::<f32>()?;
            for (index, logits) in logits.iter().enumerate() {
                let uniform = uniforms[step * lanes.len() + index];
                // As a device says it: a number that is none.
                let draw = sampler.draw(DrawJob { logits, seen: &seen[index], uniform }, &mut scratch);
                let draw = draw.unwrap_or(Draw { token: 0, logprob: f32::NAN, sampling_logprob: f32::NAN });
                newest[index] = draw.token;
                if !seen[index].contains(&draw.token) {
                    seen[index].push(draw.token);
                }
                drawn.tokens.push(draw.token);
                drawn.logprobs.push(draw.logprob);
                drawn.sampling_logprobs.push(draw.sampling_logprob);
            }
        }
        Ok(drawn)
    }

    fn step(&mut self, batch: &StepBatch, cache: &mut KvCache) -> Result<Tensor, Error> {
        self.step_tokens.push(batch.tokens.len());
        self.most_spans = self.most_spans.max(batch.spans.len());
        assert!(batch.spans.iter().all(|span| !span.tokens.is_empty()));
        for span in &batch.spans {
            let expected = span.context as u32..(span.context + span.tokens.len()) as u32;
            assert_eq!(batch.positions[span.tokens.clone()], expected.collect::<Vec<_>>());
        }
        let mut rows: Vec<Vec<f32>> =
            batch.tokens.iter().zip(&batch.positions).map(|(&t, &p)| self.embed(t, p)).collect();
        for (index, layer) in self.layers.iter().enumerate() {
            let project = |weight: &[f32]| rows.iter().flat_map(|row| multiply(weight, row)).collect::<Vec<f32>>();
            cache.write_step(index, batch, &project(&layer.key), &project(&layer.value))?;
            let mut attended = vec![0.0; rows.len() * HIDDEN];
            cache.attend(index, batch, HEADS, attention_scale(), &project(&layer.query), &mut attended)?;
            for (row, attended) in rows.iter_mut().zip(attended.chunks_exact(HIDDEN)) {
                *row = residual(row, attended);
            }
        }
        let logits: Vec<f32> = batch.logit_rows.iter().flat_map(|&row| self.logits(&rows[row])).collect();
        Ok(Tensor::from_vec(logits, (batch.logit_rows.len(), self.vocab_size), &Device::Cpu)?)
    }
}

fn attention_scale() -> f32 {
    1.0 / (HEAD_DIM as f32).sqrt()
}

fn residual(row: &[f32], attended: &[f32]) -> Vec<f32> {
    row.iter().zip(attended).map(|(x, a)| 0.7 * x + 2.0 * a.tanh()).collect()
}

fn multiply(weight: &[f32], row: &[f32]) -> Vec<f32> {
    weight.chunks_exact(row.len()).map(|w| w.iter().zip(row).map(|(a, b)| a * b).sum()).collect()
}
