//! f16 and bf16 to f32, and f32 to bf16, without branches, so that loops over them vectorise on any machine.

/// f16 to f32, exact for every value; a NaN stays a NaN.
///
/// The exponent is rebased by a multiplication with 2^112, which also normalises f16's subnormals.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    const REBASE: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * REBASE).to_bits();
    let special = magnitude | 0x7f80_0000;
    let value = if magnitude >= 0x0f80_0000 { special } else { finite };
    f32::from_bits(value | (u32::from(bits & 0x8000) << 16))
}

/// bf16 to f32, exact.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 to bf16, to the nearest, ties to even; a NaN stays a NaN.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let quiet = bits | 0x0040_0000;
    ((if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) >> 16) as u16
}

/// The little-endian f16 at the start of `bytes`.
#[inline(always)]
pub(crate) fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    #[test]
    fn every_half_float_converts_as_the_reference_does() {
        for bits in 0..=u16::MAX {
            let (ours, reference) = (super::f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == reference.to_bits() || (ours.is_nan() && reference.is_nan()), "f16 {bits:#06x}");
            let (ours, reference) = (super::bf16_to_f32(bits), bf16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == reference.to_bits() || (ours.is_nan() && reference.is_nan()), "bf16 {bits:#06x}");
        }
    }
}
