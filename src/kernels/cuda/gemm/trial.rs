//! Trials of algorithms: what they take of time on operands of the same sizes.
//!
//! No product makes one. They are a phase of their own between two steps, for the kinds of products that were noted since the
//! last one. There are two. The first times a few runs of each algorithm and leaves those that come close to the fastest. A GPU
//! that multiplies without a pause comes to its power limit and lowers its clock, and then the algorithm that takes the least
//! energy is the fastest, often another one. So large products, which a step is made of, have a second trial: each algorithm that
//! was left runs for so long that the clock follows.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use cudarc::driver::sys::{CUevent_flags, cuMemcpyDtoDAsync_v2};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::choose::{Choice, Key, Waiting};
use super::descriptors::Descriptors;
use super::lt::{Algorithm, Library, is_refusal, library};
use super::product::{FULL_ALIGNMENT, Kind, Product};
use crate::device::{Error, Matrix, Pointer, array, cuda, failed};
use crate::kernels::cuda::products::{Side, Tried};
use crate::rng::Stream;

/// Runs that are timed together, in each of some rounds: the clock of a GPU changes under load, so that all must be timed
/// under all of it. One that is so much slower in a round is left out of the next.
const TIMED_RUNS: usize = 3;
const ROUNDS: usize = 3;
const CLEARLY_SLOWER: f32 = 1.1;

/// The part of the time of the algorithm in use that another must stay below to take its place.
const CLEARLY_FASTER: f32 = 0.98;

/// Algorithms that the second trial compares: at most so many whose time was at most so many times the least.
const MAX_FINALISTS: usize = 6;
const FINALIST: f32 = 1.05;

/// Milliseconds that the products of a kind have taken since it was noted, and one of them, from which on they have a second
/// trial; and least rows, columns and summands: memory bounds what is smaller, not power.
const USED_MS: f32 = 2.0;
const LONG_MS: f32 = 0.1;
const LEAST_SIZE: usize = 512;

/// Milliseconds that an algorithm runs before it is timed in the second trial, and while it is.
const LOADED_MS: f32 = 40.0;
/// What takes the place of [`CLEARLY_FASTER`] there: the times are of many runs.
const FASTER_UNDER_LOAD: f32 = 0.995;

/// Values that operands are filled with, again and again.
const NOISE_VALUES: usize = 1 << 18;

/// Forgets all choices of `device`. From here on kinds of products that have none are noted for [`try_noted`], or not; it is
/// not so at first. Products whose sizes are alike are of one kind.
///
/// # Errors
/// If `device` is no GPU, or memory for the workspace runs out.
pub fn start_choices(device: &Device, is_noting: bool) -> Result<(), Error> {
    library(device)?.choices().start(is_noting);
    Ok(())
}

/// Says how many optimizer steps were taken: choices count from the step on after which they came.
///
/// # Errors
/// As [`start_choices`].
pub fn begin_step(device: &Device, step: u64) -> Result<(), Error> {
    library(device)?.choices().begin_step(step);
    Ok(())
}

/// Number of kinds of products that wait for a trial.
///
/// # Errors
/// As [`start_choices`].
pub fn num_noted(device: &Device) -> Result<usize, Error> {
    Ok(library(device)?.choices().waiting())
}

/// Tries algorithms for the noted kinds of products, on operands of its own, and chooses the fastest for all that comes after
/// `step` optimizer steps. A kind takes some milliseconds, one of large products up to a second, and each needs memory for a
/// product of its own; where there is none the library's choice stays. Between two kinds `should_stop` is asked whether to
/// leave the rest for another time.
///
/// # Errors
/// If the library or the device fails.
pub fn try_noted(device: &Device, step: u64, should_stop: &dyn Fn() -> bool) -> Result<Tried, Error> {
    let started = Instant::now();
    let library = library(device)?;
    let stream = cuda(device)?.cuda_stream();
    stream.context().bind_to_thread().map_err(failed("using the device"))?;
    library.choices().begin_step(step);
    let mut noise = Noise { device, stream: &stream, by_type: Vec::new() };
    let mut products = 0;
    loop {
        // Not held during the trial: others may multiply meanwhile.
        let waiting = library.choices().first_waiting();
        let Some(waiting) = waiting.filter(|_| !should_stop()) else { break };
        let choice = match Trial::new(&library, &waiting.largest, &mut noise)? {
            Some(trial) => {
                trial.choose(&waiting)?.map(|(algorithm, ms)| Choice { algorithm, micros: 1e3 * ms, since: step })
            }
            None => None,
        };
        library.choices().settle(waiting.kind, choice);
        products += 1;
    }
    Ok(Tried { products, secs: started.elapsed().as_secs_f64() })
}

/// Normal values on the device: what a product takes of power depends on what it multiplies.
struct Noise<'a> {
    device: &'a Device,
    stream: &'a Arc<CudaStream>,
    by_type: Vec<(DType, Tensor)>,
}

impl Noise<'_> {
    /// The values in a type.
    fn of_type(&mut self, dtype: DType) -> Result<Pointer<'_>, Error> {
        if !self.by_type.iter().any(|(known, _)| *known == dtype) {
            let mut stream = Stream::new(0, "operands of product trials", 0, 0);
            let values: Vec<f32> = (0..NOISE_VALUES).map(|_| stream.normal() as f32).collect();
            let values = Tensor::from_vec(values, NOISE_VALUES, &Device::Cpu)?.to_dtype(dtype)?;
            self.by_type.push((dtype, values.to_device(self.device)?));
        }
        let (_, values) = self.by_type.iter().find(|(known, _)| *known == dtype).expect("it was just made");
        array(values)
    }

    /// Memory that holds `elements` values from an address with that alignment on; `None` if there is no room.
    fn operand(
        &mut self,
        dtype: DType,
        elements: usize,
        alignment: u32,
    ) -> Result<Option<(CudaSlice<u8>, u64)>, Error> {
        // The values live as long as `self`.
        let values = self.of_type(dtype)?.address;
        let (bytes, step) = (elements * dtype.size_in_bytes(), NOISE_VALUES * dtype.size_in_bytes());
        // SAFETY: bytes, for which any bits are a value.
        let Ok(memory) = (unsafe { cuda(self.device)?.alloc::<u8>(bytes + FULL_ALIGNMENT as usize) }) else {
            return Ok(None);
        };
        let address = memory.device_ptr(self.stream).0 + u64::from(alignment % FULL_ALIGNMENT);
        for start in (0..bytes).step_by(step) {
            let (to, length) = (address + start as u64, step.min(bytes - start));
            // SAFETY: `length` bytes of both lie inside of live device memory; the stream orders the copy.
            let copied = unsafe { cuMemcpyDtoDAsync_v2(to, values, length, self.stream.cu_stream()) };
            copied.result().map_err(failed("filling an operand"))?;
        }
        Ok(Some((memory, address)))
    }
}

/// Runs of a product for the sake of their time.
struct Trial<'a> {
    library: &'a Library,
    stream: &'a Arc<CudaStream>,
    /// Of what lies in `_memory`.
    product: Product<'a>,
    descriptors: Descriptors,
    /// What the operands lie in.
    _memory: Vec<CudaSlice<u8>>,
}

impl<'a> Trial<'a> {
    /// `None` if there is no room for the operands, or the library refuses the product.
    fn new(library: &'a Library, key: &Key, noise: &mut Noise<'a>) -> Result<Option<Self>, Error> {
        let [m, n, k] = key.sizes;
        let [from, to] = key.types;
        let [a_side, b_side] = key.sides;
        let stored = |rows, cols, side| if side == Side::Plain { (rows, cols) } else { (cols, rows) };
        let shapes = [stored(m, k, a_side), stored(k, n, b_side), (m, n), (m, n)];
        let mut memory = Vec::new();
        let mut matrices = Vec::new();
        for (index, (dtype, (rows, cols))) in [from, from, to, to].into_iter().zip(shapes).enumerate() {
            let stride = key.strides[index];
            // What is not added to from elsewhere is the result itself.
            if index == 3 && key.kind != Kind::Onto {
                matrices.push(matrices[2]);
                continue;
            }
            let elements = rows.saturating_sub(1) * stride + cols;
            let Some((bytes, address)) = noise.operand(dtype, elements, key.alignments[index])? else {
                return Ok(None);
            };
            memory.push(bytes);
            matrices.push(Matrix { address, dtype, rows, cols, stride, lent: PhantomData });
        }
        let bias = if key.has_bias {
            let Some((bytes, address)) = noise.operand(to, n, FULL_ALIGNMENT)? else { return Ok(None) };
            memory.push(bytes);
            Some(Pointer { address, dtype: to, len: n, lent: PhantomData })
        } else {
            None
        };
        let [a, b, c, d] = [0, 1, 2, 3].map(|index| matrices[index]);
        let product = Product { m, n, k, d, c, a, b, a_side, b_side, alpha: 1.0, kind: key.kind, bias };
        let descriptors = match Descriptors::new(&product) {
            Err(error) if is_refusal(error) => return Ok(None),
            descriptors => descriptors.map_err(|error| product.failed(error))?,
        };
        Ok(Some(Self { library, stream: noise.stream, product, descriptors, _memory: memory }))
    }

    /// The fastest algorithm and the milliseconds of its product in the first trial; `None` if there is none.
    fn choose(&self, waiting: &Waiting) -> Result<Option<(Algorithm, f32)>, Error> {
        let candidates = self.library.candidates(&self.product, &self.descriptors);
        let candidates = candidates.map_err(|error| self.product.failed(error))?;
        let Some((best, ms, near)) = self.first(&candidates)? else { return Ok(None) };
        let is_large = waiting.largest.sizes.iter().all(|&size| size >= LEAST_SIZE);
        let is_long = ms >= LONG_MS && ms * waiting.uses as f32 >= USED_MS;
        let best = if is_large && is_long && near.len() > 1 { self.second(best, ms, &near)? } else { best };
        Ok(Some((best, ms)))
    }

    /// The fastest of some algorithms, timed in turns: the first, which the library expects to be it, unless another is clearly
    /// faster. And its milliseconds, and the algorithms that come close.
    fn first(&self, candidates: &[Algorithm]) -> Result<Option<(Algorithm, f32, Vec<Algorithm>)>, Error> {
        let mut usable = Vec::with_capacity(candidates.len());
        for algorithm in candidates {
            if self.can_run(algorithm)? {
                usable.push((f32::INFINITY, *algorithm));
            }
        }
        let mut fastest = f32::INFINITY;
        for _ in 0..ROUNDS {
            for (least, algorithm) in usable.iter_mut().filter(|one| one.0 <= CLEARLY_SLOWER * fastest) {
                *least = least.min(self.time(algorithm, TIMED_RUNS)?);
            }
            fastest = usable.iter().fold(fastest, |least, one| least.min(one.0));
        }
        let Some(&first) = usable.first() else { return Ok(None) };
        usable.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (ms, best) = if usable[0].0 < CLEARLY_FASTER * first.0 { usable[0] } else { first };
        let near =
            usable.iter().filter(|one| one.0 <= FINALIST * fastest).map(|one| one.1).take(MAX_FINALISTS).collect();
        Ok(Some((best, ms, near)))
    }

    /// Of the algorithms that the first trial left, the one that is fastest when it runs without a pause.
    fn second(&self, first: Algorithm, ms: f32, near: &[Algorithm]) -> Result<Algorithm, Error> {
        let mut best = (f32::INFINITY, first);
        let runs = (LOADED_MS / ms).ceil() as usize;
        for algorithm in std::iter::once(&first).chain(near.iter().filter(|one| **one != first)) {
            self.run(algorithm, runs)?;
            let ms = self.time(algorithm, runs)?;
            let margin = if best.0.is_finite() { FASTER_UNDER_LOAD } else { 1.0 };
            if ms < margin * best.0 {
                best = (ms, *algorithm);
            }
        }
        Ok(best.1)
    }

    /// Runs once; false if the library refuses.
    fn can_run(&self, algorithm: &Algorithm) -> Result<bool, Error> {
        match self.library.launch(&self.product, &self.descriptors, algorithm, self.stream) {
            Err(error) if is_refusal(error) => Ok(false),
            done => done.map(|()| true).map_err(|error| self.product.failed(error)),
        }
    }

    fn run(&self, algorithm: &Algorithm, times: usize) -> Result<(), Error> {
        let run = |_| self.library.launch(&self.product, &self.descriptors, algorithm, self.stream);
        (0..times).try_for_each(run).map_err(|error| self.product.failed(error))
    }

    /// Milliseconds of one of some runs; waits for them.
    fn time(&self, algorithm: &Algorithm, times: usize) -> Result<f32, Error> {
        let driver = failed("timing a matrix product");
        let event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver);
        let start = event()?;
        self.run(algorithm, times)?;
        Ok(start.elapsed_ms(&event()?).map_err(driver)? / times as f32)
    }
}
