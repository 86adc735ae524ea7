//! 4-bit quantisation and `Linear4bit` against bitsandbytes.
//!
//! `quant.safetensors`: every `<case>.weight` is quantised and compared with whatever `<case>.<type>.*` and
//! `<case>.<type>_from_<dtype>.*` the file holds. `linear4bit.safetensors`: every `<key>.state.weight` is read from its
//! checkpoint parts, written back, multiplied forward and backward.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, safetensors};
use trainer::config::settings::QuantType;
use trainer::fs::Bytes;
use trainer::quant::{BitsandbytesParts, Nf4Matrix, Weight};

use crate::report::{Report, max_difference};

/// Accumulation order of an f32 product.
const F32_PRODUCT: f64 = 1e-5;
/// Units in the last place of the largest bf16 value: the order of accumulation, and weights that bitsandbytes rounds to
/// bf16 where they stay f32 here.
const BF16_UNITS: f64 = 2.0;

type Tensors = HashMap<String, Tensor>;

pub(crate) fn run(folder: &Path, report: &mut Report) -> Result<()> {
    let tensors = safetensors::load(folder.join("quant.safetensors"), &Device::Cpu)?;
    let mut names: Vec<&str> = tensors.keys().filter_map(|name| name.strip_suffix(".weight")).collect();
    names.sort_unstable();
    ensure!(!names.is_empty(), "quant.safetensors holds no `<case>.weight`");
    for name in names {
        for (label, quant_type) in [("nf4", QuantType::Nf4), ("fp4", QuantType::Fp4)] {
            quantization(&tensors, name, label, quant_type, report)?;
        }
    }
    let tensors = safetensors::load(folder.join("linear4bit.safetensors"), &Device::Cpu)?;
    let mut keys: Vec<&str> = tensors.keys().filter_map(|name| name.strip_suffix(".state.weight")).collect();
    keys.sort_unstable();
    ensure!(!keys.is_empty(), "linear4bit.safetensors holds no `<key>.state.weight`");
    for key in keys {
        linear(&tensors, key, report)?;
    }
    Ok(())
}

fn quantization(tensors: &Tensors, name: &str, label: &str, kind: QuantType, report: &mut Report) -> Result<()> {
    let weight = &tensors[&format!("{name}.weight")];
    let (rows, cols) = weight.dims2()?;
    if tensors.contains_key(&format!("{name}.{label}.packed")) {
        let case = format!("{name}.{label}");
        let matrix = Nf4Matrix::quantize(&floats(weight)?, rows, cols, kind, false);
        compare(tensors, &case, &matrix, report)?;
        dequantized(tensors, &case, &Weight::Nf4(matrix), report)?;
    }
    if tensors.contains_key(&format!("{name}.{label}.dq.absmax_u8")) {
        double_quantization(tensors, name, label, kind, report)?;
    }
    for dtype in ["bf16", "f16"] {
        let case = format!("{name}.{label}_from_{dtype}");
        if !tensors.contains_key(&format!("{case}.packed")) {
            continue;
        }
        let values = &tensors[&format!("{name}.weight_{dtype}")].flatten_all()?;
        let matrix = if dtype == "bf16" {
            Nf4Matrix::quantize_from(&values.to_vec1::<half::bf16>()?, rows, cols, kind, false, half::bf16::to_f32)
        } else {
            Nf4Matrix::quantize_from(&values.to_vec1::<half::f16>()?, rows, cols, kind, false, half::f16::to_f32)
        };
        compare(tensors, &case, &matrix, report)?;
        let expected = &tensors[&format!("{case}.dequant")];
        let got = Weight::Nf4(matrix).dequantize()?.to_dtype(expected.dtype())?;
        same_bits(&format!("{case}.dequant"), &floats(&got)?, &floats(expected)?, report);
    }
    Ok(())
}

fn double_quantization(tensors: &Tensors, name: &str, label: &str, kind: QuantType, report: &mut Report) -> Result<()> {
    let weight = &tensors[&format!("{name}.weight")];
    let (rows, cols) = weight.dims2()?;
    let case = format!("{name}.{label}.dq");
    let get = |part: &str| tensors.get(&format!("{case}.{part}")).with_context(|| format!("{case}.{part} is missing"));
    let expected_codes = get("absmax_u8")?.flatten_all()?.to_vec1::<u8>()?;
    let offset = floats(get("offset")?)?[0];
    let map = floats(&tensors["code.dynamic_8bit_signed"])?;
    let matrix = Nf4Matrix::quantize(&floats(weight)?, rows, cols, kind, true);
    let parts = matrix.to_bitsandbytes("float32");
    let own_map = read_floats(parts.nested_quant_map.as_ref().context("no nested map")?);
    same_bits(&format!("{case}.map"), &own_map, &map, report);
    // The mean of many maxima may differ by its order of summation, and what is left of each maximum with it.
    let own_offset = serde_json::from_slice::<serde_json::Value>(&parts.quant_state)?["nested_offset"].as_f64();
    let own_offset = own_offset.context("no nested_offset")?;
    let unit = f64::from(offset.abs().max(f32::MIN_POSITIVE)) * f64::from(f32::EPSILON);
    report.check(&format!("{case}.offset"), (own_offset - f64::from(offset)).abs(), unit);
    let nested = read_floats(parts.nested_absmax.as_ref().context("no nested maxima")?);
    let expected_nested = floats(get("nested_absmax")?)?;
    report.check(&format!("{case}.nested_absmax"), max_difference(&nested, &expected_nested), 2.0 * unit);
    let plain = Nf4Matrix::quantize(&floats(weight)?, rows, cols, kind, false).absmax();
    let wrong = expected_codes.iter().zip(&*parts.absmax).enumerate().filter(|&(block, (&expected, &got))| {
        let scaled = f64::from(plain[block] - offset) / f64::from(expected_nested[block / 256]);
        let midpoint = f64::midpoint(f64::from(map[usize::from(expected)]), f64::from(map[usize::from(got)]));
        got != expected && (scaled - midpoint).abs() > 2.0 * f64::from(f32::EPSILON) * scaled.abs()
    });
    let wrong = wrong.count();
    report.expect(&format!("{case}.absmax_u8"), wrong == 0, || format!("{wrong} of {} codes", expected_codes.len()));
    // From here on with the codes of the file, so that what is compared is the dequantisation.
    let read = BitsandbytesParts {
        absmax: Bytes::from(expected_codes),
        nested_absmax: Some(write_floats(&expected_nested)),
        quant_state: state_with_offset(&parts.quant_state, offset)?,
        ..parts
    }
    .read()?;
    same_bits(&format!("{case}.absmax"), &read.absmax(), &floats(get("absmax_reconstructed")?)?, report);
    dequantized(tensors, &case, &Weight::Nf4(read), report)
}

fn state_with_offset(state: &[u8], offset: f32) -> Result<Bytes> {
    let mut state: serde_json::Value = serde_json::from_slice(state)?;
    state["nested_offset"] = f64::from(offset).into();
    Ok(Bytes::from(serde_json::to_vec(&state)?))
}

fn compare(tensors: &Tensors, case: &str, matrix: &Nf4Matrix, report: &mut Report) -> Result<()> {
    let packed = tensors[&format!("{case}.packed")].flatten_all()?.to_vec1::<u8>()?;
    let differ = packed.iter().zip(&**matrix.packed()).filter(|(a, b)| a != b).count();
    report.expect(&format!("{case}.packed"), differ == 0 && packed.len() == matrix.packed().len(), || {
        format!("{differ} of {} bytes differ", packed.len())
    });
    same_bits(&format!("{case}.absmax"), &matrix.absmax(), &floats(&tensors[&format!("{case}.absmax")])?, report);
    Ok(())
}

fn dequantized(tensors: &Tensors, case: &str, weight: &Weight, report: &mut Report) -> Result<()> {
    let got = weight.dequantize()?;
    let expected = floats(&tensors[&format!("{case}.dequant_f32")])?;
    same_bits(&format!("{case}.dequant_f32"), &floats(&got)?, &expected, report);
    let rounded = got.to_dtype(DType::BF16)?;
    let expected = floats(&tensors[&format!("{case}.dequant_bf16")])?;
    same_bits(&format!("{case}.dequant_bf16"), &floats(&rounded)?, &expected, report);
    Ok(())
}

fn linear(tensors: &Tensors, key: &str, report: &mut Report) -> Result<()> {
    let prefix = format!("{key}.state.weight.");
    let state_name = tensors
        .keys()
        .find_map(|n| n.strip_prefix(&prefix).filter(|n| n.starts_with("quant_state.")))
        .with_context(|| format!("{key} has no quant_state"))?;
    let part = |suffix: &str| tensors.get(&format!("{prefix}{suffix}")).map(raw_bytes).transpose();
    let required = |suffix: &str| part(suffix)?.with_context(|| format!("{prefix}{suffix} is missing"));
    let parts = BitsandbytesParts {
        weight: raw_bytes(&tensors[&format!("{key}.state.weight")])?,
        absmax: required("absmax")?,
        quant_map: required("quant_map")?,
        nested_absmax: part("nested_absmax")?,
        nested_quant_map: part("nested_quant_map")?,
        quant_state: required(state_name)?,
    };
    let matrix = parts.read()?;
    report.expect(&format!("{key}.state"), matrix.state_suffix() == state_name && matrix.has_usual_values(), || {
        format!("read as {} with values {:?}", matrix.state_suffix(), &*parts.quant_map)
    });
    let state: serde_json::Value = serde_json::from_slice(&parts.quant_state)?;
    let written = matrix.to_bitsandbytes(state["dtype"].as_str().context("the state has no dtype")?);
    let written_state: serde_json::Value = serde_json::from_slice(&written.quant_state)?;
    let is_same = state == written_state
        && *written.weight == *parts.weight
        && *written.absmax == *parts.absmax
        && *written.quant_map == *parts.quant_map
        && written.nested_absmax.as_deref() == parts.nested_absmax.as_deref()
        && written.nested_quant_map.as_deref() == parts.nested_quant_map.as_deref();
    report.expect(&format!("{key}.written_back"), is_same, || format!("{state} became {written_state}"));
    let original = &tensors[&format!("{key}.weight_f32")];
    let (rows, cols) = original.dims2()?;
    let again = Nf4Matrix::quantize(&floats(original)?, rows, cols, matrix.quant_type(), matrix.is_double_quantized());
    report.expect(&format!("{key}.quantized_again"), **again.packed() == **matrix.packed(), || "codes differ".into());
    products(tensors, key, &Weight::Nf4(matrix), report)
}

fn products(tensors: &Tensors, key: &str, weight: &Weight, report: &mut Report) -> Result<()> {
    for (label, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let tolerance = |values: &[f32]| match dtype {
            DType::BF16 => BF16_UNITS * 2f64.powf(largest(values).log2().floor() - 7.0),
            _ => F32_PRODUCT * largest(values).max(1.0),
        };
        let flat = |name: &str, columns: usize| -> Result<Tensor> {
            let tensor = &tensors[&format!("{key}.{name}")];
            Ok(tensor.reshape((tensor.elem_count() / columns, columns))?.to_dtype(dtype)?)
        };
        let expected = &tensors[&format!("{key}.{label}.y")].to_dtype(DType::F32)?;
        let mut y = weight.forward(&flat("x_f32", weight.cols())?)?.to_dtype(DType::F32)?;
        if let Some(bias) = tensors.get(&format!("{key}.bias_f32")) {
            y = y.broadcast_add(&bias.to_dtype(dtype)?.to_dtype(DType::F32)?)?;
        }
        let (y, expected) = (floats(&y.to_dtype(dtype)?)?, floats(expected)?);
        report.check(&format!("{key}.{label}.y"), max_difference(&y, &expected), tolerance(&expected));
        let grad = weight.backward_input(&flat("dy_f32", weight.rows())?)?;
        let expected = floats(&tensors[&format!("{key}.{label}.grad_x")])?;
        report.check(
            &format!("{key}.{label}.grad_x"),
            max_difference(&floats(&grad)?, &expected),
            tolerance(&expected),
        );
    }
    Ok(())
}

fn same_bits(case: &str, got: &[f32], expected: &[f32], report: &mut Report) {
    let differ = got.iter().zip(expected).filter(|(g, e)| g != e).count();
    report.expect(case, differ == 0 && got.len() == expected.len(), || {
        format!("{differ} of {} values differ, largest by {:e}", expected.len(), max_difference(got, expected))
    });
}

fn largest(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |m, v| m.max(f64::from(v.abs())))
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn raw_bytes(tensor: &Tensor) -> Result<Bytes> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::U8 => Bytes::from(flat.to_vec1::<u8>()?),
        _ => write_floats(&flat.to_vec1::<f32>()?),
    })
}

fn write_floats(values: &[f32]) -> Bytes {
    Bytes::from(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
}

fn read_floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
