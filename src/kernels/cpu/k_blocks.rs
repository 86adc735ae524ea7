//! ggml's k-quants: blocks of 256 values whose group scales are themselves quantised.

use super::half_float::f16_at;

/// Scale and minimum of group `group` (of 8) out of the 12 packed bytes of `Q4_K` and `Q5_K`, 6 bits each.
#[inline(always)]
pub(crate) fn scale_and_minimum(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        ((low & 15) | (packed[group - 4] >> 6 << 4), (low >> 4) | (packed[group] >> 6 << 4))
    }
}

/// The 16 scales of `Q3_K`, 6 bits each with an offset of 32, out of their 12 packed bytes.
#[inline(always)]
pub(crate) fn q3_scales(packed: &[u8]) -> [i8; 16] {
    std::array::from_fn(|i| {
        let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
        let high = (packed[8 + i % 4] >> (2 * (i / 4))) & 3;
        (low | (high << 4)) as i8 - 32
    })
}

#[inline(always)]
pub(super) fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (scale, minimum) = (f16_at(block, 80), f16_at(block, 82));
    for half in 0..2 {
        for part in 0..8 {
            let packed = scales[8 * half + part];
            let (group_scale, group_minimum) = (scale * f32::from(packed & 15), minimum * f32::from(packed >> 4));
            let shift = 2 * (part / 2);
            for i in 0..16 {
                let code = (codes[32 * half + 16 * (part % 2) + i] >> shift) & 3;
                out[128 * half + 16 * part + i] = group_scale * f32::from(code) - group_minimum;
            }
        }
    }
}

#[inline(always)]
pub(super) fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (mask, codes) = (&block[..32], &block[32..96]);
    let scales = q3_scales(&block[96..108]);
    let scale = f16_at(block, 108);
    for half in 0..2 {
        for part in 0..8 {
            let group_scale = scale * f32::from(scales[8 * half + part]);
            let shift = 2 * (part / 2);
            let bit = 4 * half + part / 2;
            for i in 0..16 {
                let at = 16 * (part % 2) + i;
                let low = (codes[32 * half + at] >> shift) & 3;
                let high = (mask[at] >> bit) & 1;
                out[128 * half + 16 * part + i] = group_scale * f32::from((low | (high << 2)) as i8 - 4);
            }
        }
    }
}

#[inline(always)]
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (scale, minimum) = (f16_at(block, 0), f16_at(block, 2));
    let (packed, codes) = (&block[4..16], &block[16..144]);
    for group in 0..8 {
        let (s, m) = scale_and_minimum(packed, group);
        let (group_scale, group_minimum) = (scale * f32::from(s), minimum * f32::from(m));
        let shift = 4 * (group % 2);
        for i in 0..32 {
            let code = (codes[32 * (group / 2) + i] >> shift) & 15;
            out[32 * group + i] = group_scale * f32::from(code) - group_minimum;
        }
    }
}

#[inline(always)]
pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (scale, minimum) = (f16_at(block, 0), f16_at(block, 2));
    let (packed, high_bits, codes) = (&block[4..16], &block[16..48], &block[48..176]);
    for group in 0..8 {
        let (s, m) = scale_and_minimum(packed, group);
        let (group_scale, group_minimum) = (scale * f32::from(s), minimum * f32::from(m));
        let shift = 4 * (group % 2);
        for i in 0..32 {
            let code = ((codes[32 * (group / 2) + i] >> shift) & 15) | (((high_bits[i] >> group) & 1) << 4);
            out[32 * group + i] = group_scale * f32::from(code) - group_minimum;
        }
    }
}

#[inline(always)]
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low_bits, high_bits, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let scale = f16_at(block, 208);
    for half in 0..2 {
        for quarter in 0..4 {
            for part in 0..2 {
                let group_scale = scale * f32::from(scales[8 * half + 2 * quarter + part] as i8);
                for i in 0..16 {
                    let at = 16 * part + i;
                    let low = (low_bits[64 * half + 32 * (quarter % 2) + at] >> (4 * (quarter / 2))) & 15;
                    let high = (high_bits[32 * half + at] >> (2 * quarter)) & 3;
                    out[128 * half + 32 * quarter + at] = group_scale * f32::from((low | (high << 4)) as i8 - 32);
                }
            }
        }
    }
}
