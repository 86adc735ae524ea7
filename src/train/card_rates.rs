//! What the run's cards reach, measured once at its start and kept in its folder, so that ranks and a run that goes on plan with the
//! same numbers: large products, the card's memory, copies from and to page-locked memory at once, and, where ranks exchange the
//! memory of their GPUs, a gather.
//!
//! It takes some tenths of a second and 200 MB of the card's memory. Plans that follow from rates change no bit of the training (see
//! `engine/retention.rs`); with `full_determinism` nothing is measured all the same, and plans follow from the card's generation.

use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::Backend;
use crate::device::{Buffer, Queue, Ticket, empty, matrix};
use crate::engine::Rates;
use crate::kernels::cuda::{Accumulate, Side, gemm, origin_name};
use crate::rng::Stream;
use crate::zero::Sharing;

/// File of an `output_dir` with the rates.
const RATES: &str = "rates.json";
const FORMAT: u32 = 1;
/// More than rates come to.
const MOST_BYTES: u64 = 1 << 16;

/// Width of the product that is timed on a GPU.
const SIZE: usize = 4096;
/// What products reach without a pause, of what they reach after one: a card comes to its power limit.
const WITHOUT_PAUSE: f64 = 0.9;
/// Bytes of a copy in the card's memory, more than its cache holds of both ends, and of one each way over the bus.
const MEMORY_BYTES: usize = 96 << 20;
const BUS_BYTES: usize = 32 << 20;
/// Bytes that a gather brings together.
const GATHER_BYTES: usize = 64 << 20;
const REPEATS: u32 = 8;

/// Rates as a file has them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    /// The card, the driver and the library.
    origin: String,
    /// Type of the products.
    dtype: String,
    /// Ranks that gathered.
    world_size: usize,
    products: f64,
    memory: f64,
    bus: f64,
    link: f64,
}

impl File {
    /// What it says; or why that is of no use here.
    fn read(text: &[u8], origin: &str, dtype: &str, world_size: usize) -> Result<Rates, String> {
        let file: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if file.format != FORMAT {
            return Err(format!("its format is {}, expected {FORMAT}", file.format));
        }
        if (file.origin.as_str(), file.dtype.as_str(), file.world_size) != (origin, dtype, world_size) {
            return Err(format!(
                "it is of {}, {}, {} ranks, and this is {origin}, {dtype}, {world_size} ranks",
                file.origin, file.dtype, file.world_size
            ));
        }
        let numbers = [file.products, file.memory, file.bus, file.link];
        if !numbers.iter().all(|&rate| is_rate(rate)) {
            return Err(format!("{numbers:?} are no rates"));
        }
        let [products, memory, bus, link] = numbers;
        Ok(Rates { products, memory, bus, link, is_measured: true })
    }
}

fn is_rate(rate: f64) -> bool {
    rate.is_finite() && rate > 0.0
}

/// The rates that a run plans with: those that `from`, the folder of the run that it goes on from, holds, else measured ones, which
/// `say` announces and the first rank keeps in `folder`; without folders nothing is read or kept. Of several ranks the slowest counts.
/// `None` where nothing is measured: on the CPU, and where the run `is_deterministic`. All ranks call this together, before products
/// are noted for trials.
///
/// # Errors
/// If a rank is lost or the file cannot be written.
pub(super) fn of_run(
    backend: &Backend,
    sharing: &Sharing,
    folders: Option<(&Path, &Path)>,
    is_deterministic: bool,
    say: &dyn Fn(&str),
) -> anyhow::Result<Option<Rates>> {
    if !backend.device.is_cuda() || is_deterministic {
        return Ok(None);
    }
    let (ranks, dtype) = (sharing.ranks(), backend.types.compute.as_str());
    let origin = origin_name(&backend.device)?;
    // The first rank looks for all of them, so that all measure or none does.
    let mut kept = Vec::new();
    if let (true, Some((from, _))) = (ranks.is_first(), folders) {
        let path = from.join(RATES);
        if let Some(text) = path.is_file().then(|| crate::fs::read_bounded(&path, MOST_BYTES)).transpose()?.flatten() {
            match File::read(&text, &origin, dtype, sharing.world_size()) {
                Ok(_) => kept = text,
                Err(reason) => tracing::warn!("`{}` is not used, and rates are measured: {reason}", path.display()),
            }
        }
    }
    ranks.broadcast(&mut kept, 0)?;
    let rates = if kept.is_empty() {
        say("measuring what the card reaches");
        let started = Instant::now();
        let Some(rates) = measure(backend, sharing)? else { return Ok(None) };
        say(&format!("measured in {:.1} s: {}", started.elapsed().as_secs_f64(), rates.describe(sharing.world_size())));
        rates
    } else {
        let file: File = serde_json::from_slice(&kept)?;
        // Read by the first rank, which found it right.
        let File { products, memory, bus, link, .. } = file;
        Rates { products, memory, bus, link, is_measured: true }
    };
    if let (true, Some((_, folder))) = (ranks.is_first(), folders) {
        let Rates { products, memory, bus, link, .. } = rates;
        let (dtype, world_size) = (dtype.to_string(), sharing.world_size());
        let file = File { format: FORMAT, origin, dtype, world_size, products, memory, bus, link };
        crate::fs::write_atomic(&folder.join(RATES), serde_json::to_string_pretty(&file)?.as_bytes())?;
    }
    Ok(Some(rates))
}

/// Measures on all ranks at once; `None`, with a warning, where one of them could not.
fn measure(backend: &Backend, sharing: &Sharing) -> anyhow::Result<Option<Rates>> {
    let assumed = Rates::assumed(&backend.device, backend.types.compute);
    let own = own_rates(backend);
    if let Err(error) = &own {
        tracing::warn!("what the card reaches could not be measured, and plans take what is assumed of it: {error:#}");
    }
    let own = own.map_or([0.0; 3], |[products, memory, bus]| [products, memory, bus]);
    let Some([products, memory, bus]) = slowest(sharing, own)? else { return Ok(None) };
    let link = match sharing.time_gather(&backend.device, GATHER_BYTES, REPEATS)? {
        None => assumed.link,
        Some(secs) => {
            let others = (sharing.world_size() - 1) as f64 / sharing.world_size() as f64;
            let Some([link]) = slowest(sharing, [GATHER_BYTES as f64 * others / secs])? else { return Ok(None) };
            link
        }
    };
    Ok(Some(Rates { products, memory, bus, link, is_measured: true }))
}

/// The least of each number over ranks; `None` if one is no rate.
fn slowest<const N: usize>(sharing: &Sharing, own: [f64; N]) -> anyhow::Result<Option<[f64; N]>> {
    let bytes: Vec<u8> = own.iter().flat_map(|rate| rate.to_le_bytes()).collect();
    let all = sharing.ranks().all_gather_bytes(&bytes)?;
    let mut least = [f64::INFINITY; N];
    for told in &all {
        let (numbers, rest) = told.as_chunks::<8>();
        if numbers.len() != N || !rest.is_empty() {
            anyhow::bail!(
                "a rank told {} bytes of rates, expected {}: do all ranks run one program?",
                told.len(),
                8 * N
            );
        }
        for (least, &number) in least.iter_mut().zip(numbers) {
            let rate = f64::from_le_bytes(number);
            // What could not be measured on one rank is not known of all.
            *least = if is_rate(rate) { least.min(rate) } else { f64::NEG_INFINITY };
        }
    }
    Ok(least.iter().all(|&rate| is_rate(rate)).then_some(least))
}

/// Products, memory and bus of this rank's card.
fn own_rates(backend: &Backend) -> anyhow::Result<[f64; 3]> {
    let main = Queue::of(&backend.device)?;
    let memory = {
        let [from, to] = pair(|| Buffer::device(&main, MEMORY_BYTES))?;
        let copies = || {
            (0..REPEATS).try_for_each(|_| main.copy(&from.whole(), &to.whole(), &Ticket::done()).map(drop))?;
            Ok(main.synchronize()?)
        };
        // Read and written.
        2.0 * MEMORY_BYTES as f64 * f64::from(REPEATS) / shortest(&copies)?
    };
    let bus = {
        let there = pair(|| Buffer::pinned(&main, BUS_BYTES))?;
        let here = pair(|| Buffer::device(&main, BUS_BYTES))?;
        let [out, back] = [main.beside()?, main.beside()?];
        let made = main.ticket()?;
        let copies = || {
            for _ in 0..REPEATS {
                out.copy(&here[0].whole(), &there[0].whole(), &made)?;
                back.copy(&there[1].whole(), &here[1].whole(), &made)?;
            }
            out.synchronize()?;
            Ok(back.synchronize()?)
        };
        BUS_BYTES as f64 * f64::from(REPEATS) / shortest(&copies)?
    };
    Ok([WITHOUT_PAUSE * product_flops(backend)?, memory, bus])
}

fn pair(
    make: impl Fn() -> Result<Buffer, crate::device::Error>,
) -> Result<[std::sync::Arc<Buffer>; 2], crate::device::Error> {
    Ok([std::sync::Arc::new(make()?), std::sync::Arc::new(make()?)])
}

/// Seconds of the shortest of three runs, after one that is not timed.
fn shortest(work: &dyn Fn() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    work()?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let started = Instant::now();
        work()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// FLOP/s of products of two large matrices in the run's types, after a pause, made as layers make theirs.
fn product_flops(backend: &Backend) -> anyhow::Result<f64> {
    let device = &backend.device;
    let of = |name: &str| -> anyhow::Result<Tensor> {
        let mut stream = Stream::new(1, name, 0, 0);
        let row: Vec<f32> = (0..SIZE).map(|_| stream.normal() as f32).collect();
        // Values that repeat take as much power as others, and are soon made.
        let values: Vec<f32> = (0..SIZE).flat_map(|i| row[i % 97..].iter().chain(&row[..i % 97]).copied()).collect();
        Ok(Tensor::from_vec(values, (SIZE, SIZE), &Device::Cpu)?.to_dtype(backend.types.compute)?.to_device(device)?)
    };
    let (a, b, out) = (of("rates a")?, of("rates b")?, empty(device, (SIZE, SIZE), backend.types.compute)?);
    let products = || {
        for _ in 0..REPEATS {
            let (a, b) = ((matrix(&a)?, Side::Plain), (matrix(&b)?, Side::Transposed));
            gemm(device, matrix(&out)?, a, b, 1.0, Accumulate::No, None)?;
        }
        Ok(device.synchronize()?)
    };
    Ok(2.0 * (SIZE as f64).powi(3) * f64::from(REPEATS) / shortest(&products)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        let (origin, dtype) = ("a card (9.0), driver 13000, cuBLASLt 130100".to_string(), "bf16".to_string());
        File { format: FORMAT, origin, dtype, world_size: 2, products: 7e14, memory: 4e12, bus: 5.1e10, link: 2e11 }
    }

    #[test]
    fn rates_are_read_where_they_were_measured_and_nowhere_else() {
        let text = serde_json::to_vec(&file()).unwrap();
        let origin = file().origin;
        let want = Rates { products: 7e14, memory: 4e12, bus: 5.1e10, link: 2e11, is_measured: true };
        assert_eq!(File::read(&text, &origin, "bf16", 2), Ok(want));
        let wrong =
            |text: &[u8], origin: &str, dtype, world_size| File::read(text, origin, dtype, world_size).unwrap_err();
        assert!(wrong(&text, "another card", "bf16", 2).contains("another card"));
        assert!(wrong(&text, &origin, "f16", 2).contains("f16"));
        assert!(wrong(&text, &origin, "bf16", 1).contains("1 ranks"));
        assert!(!wrong(&text[1..], &origin, "bf16", 2).is_empty());
        for (broken, part) in [
            (File { format: 2, ..file() }, "format"),
            (File { bus: 0.0, ..file() }, "no rates"),
            (File { link: -1.0, ..file() }, "no rates"),
        ] {
            let text = serde_json::to_vec(&broken).unwrap();
            assert!(wrong(&text, &origin, "bf16", 2).contains(part), "{broken:?}");
        }
    }

    #[test]
    fn the_slowest_rank_counts_and_one_that_could_not_measure_leaves_all_with_what_is_assumed() {
        let alone = Sharing::alone();
        assert_eq!(slowest(&alone, [3.0, 2.0]).unwrap(), Some([3.0, 2.0]));
        for broken in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(slowest(&alone, [3.0, broken]).unwrap(), None);
        }
    }

    #[test]
    fn nothing_is_measured_on_the_cpu() {
        let backend = Backend { device: Device::Cpu, types: crate::engine::Types::F32 };
        let say = |text: &str| panic!("{text}");
        assert_eq!(of_run(&backend, &Sharing::alone(), None, false, &say).unwrap(), None);
    }
}
