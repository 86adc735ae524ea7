//! Choices of algorithms: made by trials alone, kept, taken back.

use candle_core::{DType, Device, Tensor};
use trainer::device::{empty, matrix, open};
use trainer::kernels::cuda::{
    Accumulate, Side, Taken, begin_step, choices_text, gemm, num_noted, start_choices, take_choices, try_noted,
};

use crate::support::{download, random, upload};

/// Rows, columns and summands of products of several kinds; the last has the size that is shared out among blocks.
const SIZES: [(usize, usize, usize); 4] = [(256, 384, 512), (48, 512, 8192), (1024, 1024, 1024), (16, 896, 3584 + 16)];

/// Most kinds of them: one may be made in two parts, which are kinds of their own.
const MOST_KINDS: usize = SIZES.len() + 2;

/// The results of all products on `device`, one behind the other.
fn products(device: &Device) -> Vec<f32> {
    let all = SIZES.iter().map(|&(m, n, k)| {
        let a = upload(device, &random("tuning a", m * k), (m, k), DType::BF16);
        let b = upload(device, &random("tuning b", n * k), (n, k), DType::BF16);
        let d: Tensor = empty(device, (m, n), DType::F32).unwrap();
        let (a, b) = ((matrix(&a).unwrap(), Side::Plain), (matrix(&b).unwrap(), Side::Transposed));
        gemm(device, matrix(&d).unwrap(), a, b, 1.0, Accumulate::No, None).unwrap();
        download(&d)
    });
    all.collect::<Vec<_>>().concat()
}

/// A device of its own, which starts without choices.
fn fresh(is_noting: bool) -> Device {
    let device = open(0).unwrap();
    start_choices(&device, is_noting).unwrap();
    device
}

fn same_bits(got: &[f32], want: &[f32]) -> bool {
    got.len() == want.len() && got.iter().zip(want).all(|(got, want)| got.to_bits() == want.to_bits())
}

/// A device whose products were all tried after `step` steps.
struct Tuned {
    _device: Device,
    /// Kinds of products for which one was chosen.
    kinds: usize,
    /// Kinds that were tried, and for which none could be.
    passed_over: usize,
    text: String,
    results: Vec<f32>,
}

fn tuned(step: u64) -> Tuned {
    let device = fresh(true);
    products(&device);
    let tried = try_noted(&device, step, &|| false).unwrap().products;
    assert!((1..=MOST_KINDS).contains(&tried), "{tried} kinds");
    let text = choices_text(&device).unwrap().unwrap();
    let kinds = text.matches("\"algorithm\": ").count();
    assert!((1..=tried).contains(&kinds), "{kinds} of {tried} chosen");
    Tuned { kinds, passed_over: tried - kinds, text, results: products(&device), _device: device }
}

#[test]
#[ignore = "gpu"]
fn no_product_makes_a_trial() {
    let untuned = products(&fresh(false));
    let device = fresh(true);
    for _ in 0..20 {
        assert!(same_bits(&products(&device), &untuned), "the library's first choice until a trial was asked for");
    }
    let kinds = num_noted(&device).unwrap();
    assert!((1..=MOST_KINDS).contains(&kinds), "{kinds} kinds");
    assert_eq!(choices_text(&device).unwrap(), None);
    let tried = try_noted(&device, 0, &|| true).unwrap();
    assert_eq!((tried.products, num_noted(&device).unwrap()), (0, kinds), "who is to stop leaves the rest");
    assert_eq!(try_noted(&device, 0, &|| false).unwrap().products, kinds);
    let (tuned, text) = (products(&device), choices_text(&device).unwrap());
    for _ in 0..20 {
        assert!(same_bits(&products(&device), &tuned), "nothing changes after the trials");
    }
    assert_eq!((num_noted(&device).unwrap(), choices_text(&device).unwrap()), (0, text));
    // Where nothing is noted nothing is tried.
    let device = fresh(false);
    products(&device);
    assert_eq!(num_noted(&device).unwrap(), 0);
    assert_eq!(try_noted(&device, 0, &|| false).unwrap().products, 0);
}

#[test]
#[ignore = "gpu"]
fn kept_choices_give_the_same_bits_from_the_same_step_on() {
    let untuned = products(&fresh(false));
    let Tuned { _device, kinds, passed_over, text, results: want } = tuned(5);
    for is_noting in [false, true] {
        let device = fresh(is_noting);
        assert_eq!(take_choices(&device, text.as_bytes(), true).unwrap(), Taken::Choices(kinds));
        assert!(same_bits(&products(&device), &want), "noting: {is_noting}");
        assert!(num_noted(&device).unwrap() <= if is_noting { passed_over } else { 0 });
    }
    let device = fresh(true);
    begin_step(&device, 4).unwrap();
    assert_eq!(take_choices(&device, text.as_bytes(), false).unwrap(), Taken::Choices(kinds));
    assert!(same_bits(&products(&device), &untuned), "the choices came after step 5");
    assert!(num_noted(&device).unwrap() <= passed_over, "and are not tried again before");
    begin_step(&device, 5).unwrap();
    assert!(same_bits(&products(&device), &want), "here they are valid");
    assert_eq!(choices_text(&device).unwrap().unwrap(), text);
}

#[test]
#[ignore = "gpu"]
fn choices_of_others_and_damaged_ones_are_not_taken() {
    let Tuned { _device, kinds, text, .. } = tuned(0);
    let card = text.split("\"card\": \"").nth(1).unwrap().split('"').next().unwrap();
    let digit = text.find("\"algorithm\": \"").unwrap() + "\"algorithm\": \"".len();
    let other = if text.as_bytes()[digit] == b'0' { "1" } else { "0" };
    let flipped = format!("{}{other}{}", &text[..digit], &text[digit + 1..]);
    let device = fresh(true);
    let taken = |text: &str| take_choices(&device, text.as_bytes(), true).unwrap();
    let foreign = taken(&text.replace(card, "NVIDIA Abacus (1.0)"));
    assert!(
        matches!(&foreign, Taken::Foreign(whose) if whose.contains("Abacus") && whose.contains(card)),
        "{foreign:?}"
    );
    let damaged = [
        (flipped.as_str(), "checksum"),
        (&text[..text.len() / 2], "EOF"),
        ("", "EOF"),
        ("[]", "struct"),
        (&text.replace("\"format\": 1", "\"format\": 2"), "format"),
    ];
    for (text, reason) in damaged {
        let damaged = taken(text);
        assert!(matches!(&damaged, Taken::Damaged(why) if why.contains(reason)), "{reason}: {damaged:?}");
    }
    assert_eq!(choices_text(&device).unwrap(), None);
    assert_eq!(taken(&text), Taken::Choices(kinds));
}
