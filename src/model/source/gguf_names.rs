//! llama.cpp's tensor names as Hugging Face's, for Qwen2 and Qwen3.
//!
//! llama.cpp permutes the rows of q and k for Llama; for the Qwen family it stores them as they are, so that only the
//! names differ.

/// Names outside the layers: llama.cpp's, Hugging Face's.
const OUTSIDE: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Modules inside a layer: llama.cpp's, Hugging Face's.
const INSIDE: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Hugging Face's name of a tensor of a GGUF file; `None` for a tensor that these models do not have.
pub(crate) fn hf_name(gguf: &str) -> Option<String> {
    if let Some((_, name)) = OUTSIDE.iter().find(|(other, _)| *other == gguf) {
        return Some((*name).into());
    }
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (module, parameter) = rest.rsplit_once('.')?;
    let (_, name) = INSIDE.iter().find(|(other, _)| *other == module)?;
    matches!(parameter, "weight" | "bias").then(|| format!("model.layers.{layer}.{name}.{parameter}"))
}

#[cfg(test)]
mod tests {
    use super::hf_name;

    #[test]
    fn every_weight_has_its_counterpart() {
        for (gguf, hf) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
            ("blk.17.ffn_down.weight", "model.layers.17.mlp.down_proj.weight"),
            ("blk.3.attn_k_norm.weight", "model.layers.3.self_attn.k_norm.weight"),
            ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ] {
            assert_eq!(hf_name(gguf).as_deref(), Some(hf));
        }
    }

    #[test]
    fn foreign_names_have_no_counterpart() {
        for name in ["rope_freqs.weight", "blk.0.ffn_gate_inp.weight", "blk.x.attn_q.weight", "blk.0.attn_q.scale", ""]
        {
            assert_eq!(hf_name(name), None, "{name}");
        }
    }
}
