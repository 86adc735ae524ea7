//! Rotary position embedding (Su et al., 2104.09864), in the half-split layout of Hugging Face's Qwen.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::view::{tensor, view};
use super::{Error, shape_error};
use crate::kernels::cpu::vector;

/// Cosines and sines of the positions of one batch, shared by all layers.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// `[N, d / 2]`
    cos: Vec<f32>,
    /// `[N, d / 2]`
    sin: Vec<f32>,
    half: usize,
    /// On a GPU: f32 `[N, d / 2, 2]`, cosines and sines side by side.
    pub(super) table: Option<Tensor>,
}

impl Rotation {
    /// The angles `position * frequency`, in f32 as the reference computes them; both tables are multiplied by `scale`
    /// (`YaRN`'s attention factor, else 1).
    pub fn new(positions: &[u32], frequencies: &[f32], scale: f32) -> Self {
        let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |&f| p as f32 * f));
        let (sin, cos) = angles.map(|a| (a.sin() * scale, a.cos() * scale)).unzip();
        Self { cos, sin, half: frequencies.len(), table: None }
    }

    /// [`Self::new`] on the device that computes.
    ///
    /// # Errors
    /// If the device fails.
    pub fn on(device: &Device, positions: &[u32], frequencies: &[f32], scale: f32) -> Result<Self, Error> {
        if device.is_cuda() {
            let table = super::cuda::rope::table(device, positions, frequencies, scale)?;
            return Ok(Self { cos: vec![], sin: vec![], half: frequencies.len(), table: Some(table) });
        }
        debug_assert!(device.is_cpu(), "another device is a GPU of this build");
        Ok(Self::new(positions, frequencies, scale))
    }

    /// Rotates the heads of each row; on a GPU where they are: nothing else may need them.
    ///
    /// # Shapes
    /// `x`: `[N, heads · d]`; returns the same.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn forward_rows(&self, x: Tensor) -> Result<Tensor, Error> {
        self.turn_rows(x, 1.0)
    }

    /// The gradient of [`Self::forward_rows`]; on a GPU in the place of `dy`, which nothing else may need.
    ///
    /// # Shapes
    /// `dy`: `[N, heads · d]`; returns the same.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn backward_rows(&self, dy: Tensor) -> Result<Tensor, Error> {
        self.turn_rows(dy, -1.0)
    }

    fn turn_rows(&self, x: Tensor, sign: f32) -> Result<Tensor, Error> {
        if let Some(table) = &self.table {
            return super::cuda::rope::turn(x, table, 2 * self.half, sign < 0.0);
        }
        let (n, width) = super::view::dims2("rope", "x", &x)?;
        let d = 2 * self.half;
        Ok(self.turn(&x.reshape((n, width / d, d))?, sign)?.reshape((n, width))?)
    }

    fn turn(&self, x: &Tensor, sign: f32) -> Result<Tensor, Error> {
        const OP: &str = "rope";
        let tokens = self.cos.len() / self.half;
        let heads = match x.dims() {
            [n, heads, d] if *n == tokens && *d == 2 * self.half => *heads,
            got => return Err(shape_error(OP, "x", got, ["N", "H", "d"])),
        };
        let x = x.contiguous()?;
        let shape = x.shape().clone();
        let x = view(OP, &x)?;
        let half = self.half;
        let row = heads * 2 * half;
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(row).zip(x.par_chunks(row)).enumerate().with_min_len(16).for_each(|(token, (out, x))| {
            let cos = &self.cos[token * half..(token + 1) * half];
            let plus: Vec<f32> = self.sin[token * half..(token + 1) * half].iter().map(|s| s * sign).collect();
            let minus: Vec<f32> = plus.iter().map(|s| -s).collect();
            for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                let (first, second) = out.split_at_mut(half);
                vector::rotate(first, &x[..half], cos, &x[half..], &plus);
                vector::rotate(second, &x[half..], cos, &x[..half], &minus);
            }
        });
        tensor(out, shape)
    }

    /// Rotates each head of each token by its position.
    ///
    /// # Shapes
    /// `x`: f32 `[N, H, d]`; returns f32 `[N, H, d]`.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        self.turn(x, 1.0)
    }

    /// The gradient of [`Self::forward`]: the transposed rotation.
    ///
    /// # Shapes
    /// `dy`: f32 `[N, H, d]`; returns f32 `[N, H, d]`.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn backward(&self, dy: &Tensor) -> Result<Tensor, Error> {
        self.turn(dy, -1.0)
    }
}
