//! Drawn models as GGUF files.

use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use trainer::model::ModelConfig;
use trainer::model::source::WeightSource;

/// Writes a drawn model as GGUF: matrices as `kind`, the rest as f32. Metadata in `more` are added; a value given there replaces
/// the usual one.
pub(crate) fn write_gguf(
    path: &Path,
    config: &ModelConfig,
    source: &WeightSource,
    kind: GgmlDType,
    more: &[(&str, Value)],
) {
    let names = [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let tensors: Vec<(String, QTensor)> = source
        .names()
        .map(|name| {
            let tensor = source.tensor_f32(name).unwrap();
            let kind = if tensor.rank() == 2 { kind } else { GgmlDType::F32 };
            let name = names.iter().fold(name.to_string(), |name, (hf, gguf)| name.replace(hf, gguf));
            (name, QTensor::quantize(&tensor, kind).unwrap())
        })
        .collect();
    let arch = config.architecture.model_type();
    let number = |n: usize| Value::U32(n as u32);
    let values = [
        ("general.architecture".to_string(), Value::String(arch.into())),
        (format!("{arch}.block_count"), number(config.num_hidden_layers)),
        (format!("{arch}.context_length"), number(config.max_position_embeddings)),
        (format!("{arch}.embedding_length"), number(config.hidden_size)),
        (format!("{arch}.feed_forward_length"), number(config.intermediate_size)),
        (format!("{arch}.attention.head_count"), number(config.num_attention_heads)),
        (format!("{arch}.attention.head_count_kv"), number(config.num_key_value_heads)),
        (format!("{arch}.attention.key_length"), number(config.head_dim)),
        (format!("{arch}.attention.layer_norm_rms_epsilon"), Value::F32(1e-6)),
        (format!("{arch}.rope.freq_base"), Value::F32(10_000.0)),
        ("tokenizer.ggml.tokens".to_string(), Value::Array(vec![Value::String("a".into()), Value::String("b".into())])),
        ("tokenizer.ggml.bos_token_id".to_string(), Value::U32(1)),
        ("tokenizer.ggml.eos_token_id".to_string(), Value::U32(2)),
    ];
    let mut values: Vec<(&str, &Value)> = values.iter().map(|(k, v)| (k.as_str(), v)).collect();
    values.retain(|(key, _)| more.iter().all(|(other, _)| other != key));
    values.extend(more.iter().map(|(key, value)| (*key, value)));
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &values, &tensors).unwrap();
}
