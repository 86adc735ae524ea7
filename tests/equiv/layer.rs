//! What stays of a layer between forward and backward must not matter: every way against the layer that keeps everything.

use candle_core::{DType, Device, Tensor};
use trainer::engine::{Engine, Speaker};
use trainer::model::layer::{DecoderLayer, OfMixer, Pass, Retaining};
use trainer::ops::buffer;
use trainer::zero::{Needs, Visit};

use super::{engine, packed, sequence};

const LAYER: usize = 1;

/// The layer's output, the gradient of its input and of its parameters.
fn pass_through(
    engine: &Engine,
    work: impl FnOnce(&DecoderLayer<'_>, &Pass<'_>, &Tensor, &Tensor) -> (Tensor, Tensor),
) -> [Vec<f32>; 3] {
    let batch = packed(&[(1, sequence(40, 1)), (2, sequence(23, 2))]);
    let (tokens, hidden) = (batch.tokens.len(), engine.config().hidden_size);
    let values = |step: f32| -> Tensor {
        let values: Vec<f32> = (0..tokens * hidden).map(|i| (i as f32 * step).sin()).collect();
        Tensor::from_vec(values, (tokens, hidden), &Device::Cpu).unwrap()
    };
    let (x, dy) = (values(0.37), values(0.11));
    engine.store().zero_gradients().unwrap();
    let visit = Visit { block: 1 + LAYER, needs: Needs::Gradients };
    let mut walk = engine.store().walk([visit].into(), Speaker::Policy, engine.sums(1));
    let lease = walk.advance().unwrap();
    let rotation = engine.rotation(&batch.positions).unwrap();
    let pass =
        Pass { layout: &batch.layout, rotation: &rotation, use_adapter: true, compute: DType::F32, dropout: None };
    let layer = engine.bind_layer(lease.params(), LAYER).unwrap();
    let (y, dx) = work(&layer, &pass, &x, &dy);
    drop(layer);
    lease.end_micro_step(0).unwrap();
    lease.finish_gradients().unwrap();
    let gradients = buffer::to_vec(engine.store().flats().nth(1 + LAYER).unwrap().grads()).unwrap();
    let of = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    [of(y), of(dx), gradients]
}

#[test]
fn what_stays_of_the_halves_of_a_layer_changes_no_bit() {
    for (architecture, dropout) in [("qwen2", None), ("qwen2", Some(0.0)), ("qwen3", None), ("qwen3", Some(0.0))] {
        let engine = engine(architecture, dropout, true);
        let want = pass_through(&engine, |layer, pass, x, dy| {
            let (y, saved) = layer.forward(x, pass).unwrap();
            (y, layer.backward(dy, saved, pass).unwrap())
        });
        assert!(want.iter().all(|values| values.iter().any(|&value| value != 0.0)), "{architecture}");
        let in_parts = pass_through(&engine, |layer, pass, x, dy| {
            let (y, saved) = layer.forward(x, pass).unwrap();
            let inside = layer.backward_down_of_whole(dy, saved, pass).unwrap();
            let halfway = layer.backward_mlp(dy, inside, pass).unwrap();
            (y, layer.backward_attention(halfway, None, pass).unwrap())
        });
        assert!(in_parts == want, "{architecture}, in parts");
        for mixer in [OfMixer::Nothing, OfMixer::Attention, OfMixer::Products] {
            let got = pass_through(&engine, |layer, pass, x, dy| {
                let (y, mut retained) = layer.forward_retaining(x, Retaining { mixer, gate_up_rows: 0 }, pass).unwrap();
                let (products, rows) = (retained.take_products(), retained.take_mlp_outputs());
                assert!(products.is_none() && rows.is_none(), "they are a GPU's");
                let inside = layer.backward_down(dy, retained, None, pass).unwrap();
                let halfway = layer.backward_mlp(dy, inside, pass).unwrap();
                (y, layer.backward_attention(halfway, products, pass).unwrap())
            });
            for (what, (got, want)) in ["output", "input's gradient", "gradients"].iter().zip(got.iter().zip(&want)) {
                let differing = got.iter().zip(want).filter(|(g, w)| g.to_bits() != w.to_bits()).count();
                assert!(
                    got.len() == want.len() && differing == 0,
                    "{architecture}, {dropout:?}, {mixer:?}: {differing} values of the {what} differ"
                );
            }
        }
    }
}
