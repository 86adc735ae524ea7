//! What the tests of the kernels share: one device, random values that are fresh in each run, comparison.

use std::cell::OnceCell;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use candle_core::{DType, Device, Tensor};
use trainer::rng::Stream;

/// The first GPU, opened once a test (tests that run side by side have threads of their own): tensors of two devices do not
/// mix, and a test that lets products be tuned must not change the bits of another.
pub(crate) fn device() -> Device {
    thread_local! {
        static DEVICE: OnceCell<Device> = const { OnceCell::new() };
    }
    DEVICE.with(|device| device.get_or_init(|| trainer::device::open(0).expect("these tests need a GPU")).clone())
}

/// The seed of this run: `TRAINER_TEST_SEED`, or the time; printed once, to repeat a failure.
pub(crate) fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let seed = std::env::var("TRAINER_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let seed = seed.unwrap_or(now);
        println!("TRAINER_TEST_SEED={seed}");
        seed
    })
}

/// Normal values, other ones for each name and run.
pub(crate) fn random(name: &str, count: usize) -> Vec<f32> {
    let mut stream = Stream::new(seed(), name, count as u64, 0);
    (0..count).map(|_| stream.normal() as f32).collect()
}

/// Values on the device in a type.
pub(crate) fn upload(device: &Device, values: &[f32], shape: impl Into<candle_core::Shape>, dtype: DType) -> Tensor {
    let host = Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    host.to_device(device).unwrap()
}

/// Values on the host as f32.
pub(crate) fn download(tensor: &Tensor) -> Vec<f32> {
    let host = tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    host.flatten_all().unwrap().to_vec1().unwrap()
}

/// `‖got - want‖ / ‖want‖` is at most `tolerance`, and nothing is NaN.
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let (mut difference, mut norm) = (0f64, 0f64);
    for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
        assert!(!got.is_nan(), "{what}: element {index} is NaN, expected {want} (TRAINER_TEST_SEED={})", seed());
        difference += (f64::from(got) - f64::from(want)).powi(2);
        norm += f64::from(want).powi(2);
    }
    let error = (difference / norm.max(1e-30)).sqrt();
    assert!(
        error <= f64::from(tolerance),
        "{what}: error {error:.3e}, allowed {tolerance:.1e} (TRAINER_TEST_SEED={})",
        seed()
    );
}
