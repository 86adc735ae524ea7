//! Every operation's backward against candle's autograd and against finite differences, on random data of odd shapes.

use candle_core::{D, DType, Device, Tensor, Var};
use trainer::ops::attention::{Layout, Segment};
use trainer::ops::linear::{Adapter, Dropout, Linear, TokenKeys};
use trainer::ops::rope::Rotation;
use trainer::ops::{Param, attention, embedding, head, linear, residual, rms_norm, rows, swiglu};
use trainer::quant::Weight;
use trainer::rng::Stream;

/// f32 sums of up to a few hundred terms in another order than candle's.
const TOLERANCE: f64 = 2e-5;
/// Central differences with step 1e-2 in f32: their own error, not the gradient's.
const FINITE_DIFFERENCE_TOLERANCE: f64 = 2e-2;

fn random(shape: &[usize], item: u64) -> Tensor {
    let mut stream = Stream::new(11, "op tests", 0, item);
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| stream.normal() as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, as a share of the expected tensor's largest value.
#[track_caller]
fn assert_close(got: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(got.dims(), expected.dims(), "{what}: shapes");
    let scale = values(expected).iter().fold(1e-3f32, |m, v| m.max(v.abs()));
    let worst = values(got).iter().zip(values(expected)).fold(0.0f32, |m, (g, e)| {
        assert!(g.is_finite(), "{what}: not finite");
        m.max((g - e).abs())
    });
    assert!(f64::from(worst / scale) < TOLERANCE, "{what}: error {worst} of {scale}");
}

/// Candle's gradients of `sum(f(inputs) * cotangent)`.
fn autograd(inputs: &[&Tensor], cotangent: &Tensor, f: impl Fn(&[Tensor]) -> Tensor) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let grads = (f(&tensors) * cotangent).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|v| grads.get(v).expect("candle has a gradient for every input").clone()).collect()
}

/// Checks `gradient` against central differences of `f` in a few random directions.
#[track_caller]
fn assert_directional(x: &Tensor, gradient: &Tensor, what: &str, f: impl Fn(&Tensor) -> f64) {
    const STEP: f64 = 1e-2;
    for direction in 0..3 {
        let direction = random(x.dims(), 9_000 + direction);
        let at = |step: f64| f(&(x + (&direction * step).unwrap()).unwrap().contiguous().unwrap());
        let measured = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        let predicted = f64::from((gradient * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
        let scale = measured.abs().max(1.0);
        assert!(
            (measured - predicted).abs() / scale < FINITE_DIFFERENCE_TOLERANCE,
            "{what}: measured {measured}, predicted {predicted}"
        );
    }
}

fn weighted_sum(y: &Tensor, cotangent: &Tensor) -> f64 {
    values(y).iter().zip(values(cotangent)).map(|(y, c)| f64::from(*y) * f64::from(c)).sum()
}

fn trained(value: Tensor) -> Param {
    let grad = Tensor::zeros(value.shape(), DType::F32, &Device::Cpu).unwrap();
    Param { value, grad: Some(grad) }
}

fn grad(param: &Param) -> &Tensor {
    param.grad.as_ref().unwrap()
}

#[test]
fn rms_norm_matches_autograd_and_finite_differences() {
    for (case, (n, d)) in [(1, 8), (5, 33), (70, 64)].into_iter().enumerate() {
        let case = case as u64;
        let (x, w, dy) = (random(&[n, d], case), random(&[d], 100 + case), random(&[n, d], 200 + case));
        let reference = |t: &[Tensor]| {
            let mean = (t[0].sqr().unwrap().sum_keepdim(1).unwrap() / d as f64).unwrap();
            let normed = t[0].broadcast_div(&(mean + 1e-6).unwrap().sqrt().unwrap()).unwrap();
            normed.broadcast_mul(&t[1]).unwrap()
        };
        let weight = trained(w.clone());
        let (y, saved) = rms_norm::forward(&x, &weight, 1e-6).unwrap();
        assert_close(&y, &reference(&[x.clone(), w.clone()]), "y");
        let dx = rms_norm::backward(&dy, &x, &weight, &saved).unwrap();
        let expected = autograd(&[&x, &w], &dy, reference);
        assert_close(&dx, &expected[0], "dx");
        assert_close(grad(&weight), &expected[1], "dw");
        assert_directional(&x, &dx, "dx", |x| {
            weighted_sum(&rms_norm::forward(x, &Param::frozen(w.clone()), 1e-6).unwrap().0, &dy)
        });
    }
}

#[test]
fn swiglu_matches_autograd_and_finite_differences() {
    let (gate, up, dy) = (random(&[7, 50], 1), random(&[7, 50], 2), random(&[7, 50], 3));
    let expected = autograd(&[&gate, &up], &dy, |t| (t[0].silu().unwrap() * &t[1]).unwrap());
    let (d_gate, d_up) = swiglu::backward(&dy, &gate, &up).unwrap();
    assert_close(&d_gate, &expected[0], "d_gate");
    assert_close(&d_up, &expected[1], "d_up");
    assert_directional(&gate, &d_gate, "d_gate", |g| weighted_sum(&swiglu::forward(g, &up).unwrap(), &dy));
}

#[test]
fn rope_turns_as_hugging_face_and_its_backward_is_its_transpose() {
    let (n, heads, half) = (5, 3, 4);
    let frequencies: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
    let positions = [0, 1, 2, 7, 300];
    let rotation = Rotation::new(&positions, &frequencies, 1.25);
    let (x, dy) = (random(&[n, heads, 2 * half], 1), random(&[n, heads, 2 * half], 2));
    let y = rotation.forward(&x).unwrap();
    let (x_values, y_values) = (values(&x), values(&y));
    for (token, &position) in positions.iter().enumerate() {
        for head in 0..heads {
            for i in 0..half {
                let at = (token * heads + head) * 2 * half + i;
                let angle = position as f32 * frequencies[i];
                let (a, b) = (x_values[at], x_values[at + half]);
                assert!((y_values[at] - 1.25 * (a * angle.cos() - b * angle.sin())).abs() < 1e-4);
                assert!((y_values[at + half] - 1.25 * (b * angle.cos() + a * angle.sin())).abs() < 1e-4);
            }
        }
    }
    let dx = rotation.backward(&dy).unwrap();
    assert!((weighted_sum(&y, &dy) - weighted_sum(&x, &dx)).abs() < 1e-3);
}

/// Attention by the book: all scores, a mask, a softmax.
fn plain_attention(t: &[Tensor], allowed: &Tensor, heads: usize, kv_heads: usize) -> Tensor {
    let (n, _, d) = t[0].dims3().unwrap();
    let per_head = |x: &Tensor, h: usize| x.narrow(1, h, 1).unwrap().squeeze(1).unwrap();
    let outputs: Vec<Tensor> = (0..heads)
        .map(|h| {
            let kv = h / (heads / kv_heads);
            let (q, k, v) = (per_head(&t[0], h), per_head(&t[1], kv), per_head(&t[2], kv));
            let scores = (q.matmul(&k.t().unwrap()).unwrap() / (d as f64).sqrt()).unwrap();
            let masked = allowed.where_cond(&scores, &Tensor::full(-1e30f32, (n, n), &Device::Cpu).unwrap()).unwrap();
            candle_nn::ops::softmax(&masked, D::Minus1).unwrap().matmul(&v).unwrap()
        })
        .collect();
    Tensor::stack(&outputs, 1).unwrap()
}

fn mask(layout: &Layout) -> Tensor {
    let n = layout.num_tokens();
    let mut allowed = vec![0u8; n * n];
    for segment in layout.segments() {
        for q in segment.tokens.clone() {
            let prefix = segment.prefix.clone().unwrap_or(0..0);
            prefix.chain(segment.tokens.start..=q).for_each(|k| allowed[q * n + k] = 1);
        }
    }
    Tensor::from_vec(allowed, (n, n), &Device::Cpu).unwrap()
}

#[test]
fn attention_matches_autograd_for_packed_sequences_and_shared_prefixes() {
    let segment = |tokens, prefix| Segment { tokens, prefix };
    let layouts = [
        Layout::packed(&[0, 1]).unwrap(),
        Layout::packed(&[0, 7, 8, 90, 161]).unwrap(),
        Layout::new(vec![
            segment(0..70, None),
            segment(70..75, Some(0..70)),
            segment(75..150, Some(0..70)),
            segment(150..151, None),
            segment(151..153, Some(150..151)),
            segment(153..160, Some(150..151)),
            segment(160..163, Some(0..30)),
        ])
        .unwrap(),
    ];
    for (case, layout) in layouts.iter().enumerate() {
        for (heads, kv_heads, d) in [(4, 2, 8), (3, 3, 5), (6, 1, 16)] {
            let n = layout.num_tokens();
            let item = (case * 1000 + heads * 10) as u64;
            let (q, k) = (random(&[n, heads, d], item), random(&[n, kv_heads, d], item + 1));
            let (v, dy) = (random(&[n, kv_heads, d], item + 2), random(&[n, heads, d], item + 3));
            let allowed = mask(layout);
            let reference = |t: &[Tensor]| plain_attention(t, &allowed, heads, kv_heads);
            let (o, saved) = attention::forward(&q, &k, &v, layout).unwrap();
            assert_close(&o, &reference(&[q.clone(), k.clone(), v.clone()]), "o");
            let (dq, dk, dv) = attention::backward(&dy, &q, &k, &v, &o, layout, &saved).unwrap();
            let expected = autograd(&[&q, &k, &v], &dy, reference);
            if n > 1 {
                assert_close(&dq, &expected[0], "dq");
                assert_close(&dk, &expected[1], "dk");
            }
            assert_close(&dv, &expected[2], "dv");
            assert_directional(&k, &dk, "dk", |k| weighted_sum(&attention::forward(&q, k, &v, layout).unwrap().0, &dy));
        }
    }
}

#[test]
fn a_layout_whose_prefix_is_no_beginning_of_an_earlier_segment_is_refused() {
    let segment = |tokens, prefix| Segment { tokens, prefix };
    for segments in [
        vec![segment(0..4, None), segment(5..6, None)],
        vec![segment(0..4, None), segment(4..6, Some(1..4))],
        vec![segment(0..4, None), segment(4..6, Some(0..5))],
        vec![segment(0..2, Some(0..1)), segment(2..6, None)],
    ] {
        assert!(Layout::new(segments).is_err());
    }
}

fn low_rank(outputs: usize, inputs: usize, rank: usize, item: u64) -> Adapter {
    Adapter {
        a: trained(random(&[rank, inputs], item)),
        b: trained(random(&[outputs, rank], item + 1)),
        scaling: 0.5,
        magnitude: None,
    }
}

#[test]
fn linear_with_an_adapter_matches_autograd() {
    for (case, (n, inputs, outputs, rank)) in [(1, 64, 32, 4), (9, 70, 33, 8), (40, 128, 96, 16)].iter().enumerate() {
        let (n, inputs, outputs, rank) = (*n, *inputs, *outputs, *rank);
        let item = 50 * case as u64;
        let (x, dy) = (random(&[n, inputs], item), random(&[n, outputs], item + 1));
        let (w, bias) = (random(&[outputs, inputs], item + 2), random(&[outputs], item + 3));
        let adapter = low_rank(outputs, inputs, rank, item + 4);
        let weight_grad = Tensor::zeros((outputs, inputs), DType::F32, &Device::Cpu).unwrap();
        let layer = Linear {
            weight: Weight::Dense(w.clone()),
            weight_grad: Some(weight_grad.clone()),
            bias: Some(trained(bias.clone())),
            adapter: Some(adapter.clone()),
        };
        let reference = |t: &[Tensor]| {
            let base = t[0].matmul(&t[1].t().unwrap()).unwrap().broadcast_add(&t[2]).unwrap();
            let low = t[0].matmul(&t[3].t().unwrap()).unwrap().matmul(&t[4].t().unwrap()).unwrap();
            (base + (low * 0.5).unwrap()).unwrap()
        };
        let inputs_of = [&x, &w, &bias, &adapter.a.value, &adapter.b.value];
        let (y, saved) = layer.forward(&x, true, None).unwrap();
        assert_close(&y, &reference(&inputs_of.map(Clone::clone)), "y");
        let dx = layer.backward(&dy, &x, &saved, None).unwrap();
        let expected = autograd(&inputs_of, &dy, reference);
        assert_close(&dx, &expected[0], "dx");
        assert_close(&weight_grad, &expected[1], "dW");
        assert_close(grad(layer.bias.as_ref().unwrap()), &expected[2], "dbias");
        assert_close(grad(&adapter.a), &expected[3], "dA");
        assert_close(grad(&adapter.b), &expected[4], "dB");
        let (base, _) = layer.forward(&x, false, None).unwrap();
        let plain = x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        assert_close(&base, &plain, "base alone");
    }
}

#[test]
fn a_weight_decomposed_adapter_matches_autograd_with_a_constant_norm() {
    let (n, inputs, outputs, rank) = (6, 64, 70, 4);
    let (x, dy, w) = (random(&[n, inputs], 1), random(&[n, outputs], 2), random(&[outputs, inputs], 3));
    let magnitude = trained(random(&[outputs], 4).abs().unwrap());
    let adapter = Adapter { magnitude: Some(magnitude.clone()), ..low_rank(outputs, inputs, rank, 5) };
    let layer = Linear { adapter: Some(adapter.clone()), ..Linear::frozen(Weight::Dense(w.clone())) };
    let merged = (&w + (adapter.b.value.matmul(&adapter.a.value).unwrap() * 0.5).unwrap()).unwrap();
    let norm = merged.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
    let reference = |t: &[Tensor]| {
        let low = t[0].matmul(&t[1].t().unwrap()).unwrap().matmul(&t[2].t().unwrap()).unwrap();
        let plain = (t[0].matmul(&w.t().unwrap()).unwrap() + (low * 0.5).unwrap()).unwrap();
        plain.broadcast_mul(&(&t[3] / &norm).unwrap()).unwrap()
    };
    let inputs_of = [&x, &adapter.a.value, &adapter.b.value, &magnitude.value];
    let (y, saved) = layer.forward(&x, true, None).unwrap();
    assert_close(&y, &reference(&inputs_of.map(Clone::clone)), "y");
    let dx = layer.backward(&dy, &x, &saved, None).unwrap();
    let expected = autograd(&inputs_of, &dy, reference);
    for (got, (expected, what)) in [&dx, grad(&adapter.a), grad(&adapter.b), grad(&magnitude)]
        .into_iter()
        .zip(expected.iter().zip(["dx", "dA", "dB", "dm"]))
    {
        assert_close(got, expected, what);
    }
}

#[test]
fn dropout_scales_what_it_keeps_and_its_backward_uses_the_same_mask() {
    let (n, inputs, outputs, rank) = (5, 96, 40, 4);
    let (x, dy, w) = (random(&[n, inputs], 1), random(&[n, outputs], 2), random(&[outputs, inputs], 3));
    let adapter = low_rank(outputs, inputs, rank, 5);
    let layer = Linear { adapter: Some(adapter.clone()), ..Linear::frozen(Weight::Dense(w)) };
    let keys: Vec<u64> = (0..n as u64).map(|t| t * 77).collect();
    let token_keys = TokenKeys::from(keys.as_slice());
    let dropout = Some(Dropout { probability: 0.4, key: 9, token_keys: &token_keys });
    let forward = |x: &Tensor| layer.forward(x, true, dropout).unwrap();
    let (y, saved) = forward(&x);
    assert_eq!(values(&y), values(&forward(&x).0), "the same key drops the same elements");
    let dx = layer.backward(&dy, &x, &saved, dropout).unwrap();
    // The mask does not depend on x, so y is linear in x and the directional derivative is exact up to rounding.
    assert_directional(&x, &dx, "dx", |x| weighted_sum(&forward(x).0, &dy));
    let reversed: Vec<u64> = keys.into_iter().rev().collect();
    let reversed = TokenKeys::from(reversed.as_slice());
    let other = Some(Dropout { probability: 0.4, key: 9, token_keys: &reversed });
    assert_ne!(values(&y), values(&layer.forward(&x, true, other).unwrap().0), "tokens have masks of their own");
    let _: &linear::Saved = &saved;
}

#[test]
fn head_matches_autograd_over_several_panels_of_the_vocabulary() {
    // More than one panel of 2048 rows, and a width that is no multiple of a vector.
    for (rows, d, vocabulary, temperature) in [(3, 16, 50, 1.0), (11, 24, 5000, 0.7), (1, 8, 2048, 1.3)] {
        let (hidden, w) = (random(&[rows, d], 1), random(&[vocabulary, d], 2));
        let targets: Vec<u32> = (0..rows).map(|i| ((i * 7919 + 5) % vocabulary) as u32).collect();
        let d_logprobs = values(&random(&[rows], 3));
        let d_entropies = values(&random(&[rows], 4));
        let target_ids = Tensor::from_vec(targets.clone(), (rows, 1), &Device::Cpu).unwrap();
        let both = |t: &[Tensor]| {
            let logits = (t[0].matmul(&t[1].t().unwrap()).unwrap() / temperature).unwrap();
            let log_p = candle_nn::ops::log_softmax(&logits, 1).unwrap();
            let taken = log_p.gather(&target_ids, 1).unwrap();
            let entropy = (log_p.exp().unwrap() * &log_p).unwrap().sum_keepdim(1).unwrap().neg().unwrap();
            Tensor::cat(&[taken, entropy], 1).unwrap()
        };
        let weight = Weight::Dense(w.clone());
        let output = head::forward(&hidden, &weight, &targets, temperature).unwrap();
        let expected = both(&[hidden.clone(), w.clone()]);
        let got: Vec<f32> = output.logprobs.iter().zip(&output.entropies).flat_map(|(l, e)| [*l, *e]).collect();
        assert_close(&Tensor::from_vec(got, (rows, 2), &Device::Cpu).unwrap(), &expected, "logprobs and entropies");
        let cotangent: Vec<f32> = d_logprobs.iter().zip(&d_entropies).flat_map(|(l, e)| [*l, *e]).collect();
        let cotangent = Tensor::from_vec(cotangent, (rows, 2), &Device::Cpu).unwrap();
        let expected = autograd(&[&hidden, &w], &cotangent, both);
        let weight_grad = Tensor::zeros((vocabulary, d), DType::F32, &Device::Cpu).unwrap();
        let d_hidden = head::backward(
            &d_logprobs,
            &d_entropies,
            &hidden,
            &weight,
            Some(&weight_grad),
            &targets,
            temperature,
            &output,
        )
        .unwrap();
        assert_close(&d_hidden, &expected[0], "d_hidden");
        assert_close(&weight_grad, &expected[1], "d_weight");
        let logits = head::logits(&hidden, &weight).unwrap();
        let best: Vec<u32> = logits.argmax(1).unwrap().to_vec1().unwrap();
        let is_argmax: Vec<bool> = best.iter().zip(&targets).map(|(b, t)| b == t).collect();
        assert_eq!(output.is_argmax, is_argmax);
    }
}

#[test]
fn embedding_and_rows_pick_and_add_back() {
    let (table, dy) = (random(&[9, 5], 1), random(&[4, 5], 2));
    let tokens = [3u32, 0, 3, 8];
    let ids = Tensor::new(&tokens, &Device::Cpu).unwrap();
    let expected = autograd(&[&table], &dy, |t| t[0].index_select(&ids, 0).unwrap());
    let on_cpu = |tokens: &[u32], table: &Tensor| {
        embedding::forward(tokens, &Weight::Dense(table.clone()), &Device::Cpu, DType::F32)
    };
    let y = on_cpu(&tokens, &table).unwrap();
    assert_close(&y, &table.index_select(&ids, 0).unwrap(), "embedding");
    let table_grad = Tensor::zeros((9, 5), DType::F32, &Device::Cpu).unwrap();
    embedding::backward(&dy, &tokens, &table_grad).unwrap();
    assert_close(&table_grad, &expected[0], "embedding gradient");
    assert_close(&rows::gather(&table, &tokens).unwrap(), &y, "rows");
    assert_close(&rows::scatter_add(&dy, &tokens, 9).unwrap(), &expected[0], "rows gradient");
    let message = on_cpu(&[9], &table).unwrap_err().to_string();
    assert!(message.contains("token id 9") && message.contains("vocabulary of 9"), "{message}");
}

#[test]
fn adding_to_the_residual_stream_is_a_sum() {
    let (branch, stream) = (random(&[3, 7], 1), random(&[3, 7], 2));
    let expected = (&branch + &stream).unwrap();
    assert_close(&residual::add(branch.copy().unwrap(), &stream).unwrap(), &expected, "sum");
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let x = random(&[3, 8], 1);
    let message = rms_norm::forward(&x, &Param::frozen(random(&[7], 2)), 1e-6).unwrap_err().to_string();
    assert!(message.contains("rms_norm") && message.contains("weight") && message.contains("[8]"), "{message}");
    let bf16 = x.to_dtype(DType::BF16).unwrap();
    let message = swiglu::forward(&bf16, &bf16).unwrap_err().to_string();
    assert!(message.contains("swiglu") && message.contains("BF16"), "{message}");
}
