//! A tiny model of random weights, the same on every device.

use candle_core::Device;
use trainer::config::settings::{
    LoraSettings, ModelSettings, ModuleSet, Projection, QuantType, Quantization, WeightDtype,
};
use trainer::engine::{Activations, Engine, Types};
use trainer::model::load::{Purpose, load};
use trainer::model::params::BlockInit;
use trainer::rng::Stream;
use trainer::zero::{self, Offload, ParamStore, Sharing, Slots};

/// Entries in the vocabulary.
pub(crate) const VOCABULARY: u64 = 300;

/// What a test's model is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiny {
    /// `qwen2` or `qwen3`, with ` untied` behind it for a head with a table of its own.
    pub(crate) architecture: &'static str,
    pub(crate) head_dim: usize,
    /// Projections with an adapter, on 4-bit weights; with none, weights are dense and all trained.
    pub(crate) adapters: &'static [Projection],
    /// Dropout of the adapters' inputs.
    pub(crate) dropout: f64,
}

impl Tiny {
    pub(crate) fn config(self) -> String {
        let Self { head_dim, .. } = self;
        let tied = self.architecture.strip_suffix(" untied");
        let (architecture, is_tied) = (tied.unwrap_or(self.architecture), tied.is_none());
        let class = if architecture == "qwen2" { "Qwen2ForCausalLM" } else { "Qwen3ForCausalLM" };
        let hidden = if architecture == "qwen2" { 4 * head_dim } else { 64 };
        // Products of a normed row keep their size, so that softmax stays soft and rounding is not magnified.
        let deviation = 0.8 / f64::from(hidden as u32).sqrt();
        format!(
            r#"{{"architectures": ["{class}"], "model_type": "{architecture}", "hidden_size": {hidden},
            "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": {head_dim}, "vocab_size": {VOCABULARY}, "hidden_act": "silu", "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": {is_tied}, "use_sliding_window": false,
            "sliding_window": 4096, "max_window_layers": 3, "attention_bias": false, "initializer_range": {deviation},
            "torch_dtype": "float32", "bos_token_id": null, "eos_token_id": 1}}"#
        )
    }

    /// The same weights on every device.
    pub(crate) fn engine(self, device: &Device, types: Types) -> Engine {
        self.engine_in(device, types, &Device::Cpu, None)
    }

    /// As [`Self::engine`], from weights that `home` quantised, with the layers in slots if some are named.
    pub(crate) fn engine_in(self, device: &Device, types: Types, home: &Device, slots: Option<Slots>) -> Engine {
        self.engine_with(device, types, home, |blocks| match slots {
            Some(slots) => ParamStore::with_slots(blocks, device, slots).unwrap(),
            None => ParamStore::new(blocks, device).unwrap(),
        })
    }

    /// As [`Self::engine`], with what the ranks of `sharing` share, and what waits in host memory; what comes from there comes in
    /// the types to which blocks round it.
    pub(crate) fn engine_placed(self, device: &Device, types: Types, sharing: Sharing, offload: Offload) -> Engine {
        self.engine_with(device, types, &Device::Cpu, |blocks| {
            ParamStore::placed(blocks, device, sharing, Offload { types: types.read(), ..offload }).unwrap()
        })
    }

    fn engine_with(
        self,
        device: &Device,
        types: Types,
        home: &Device,
        store: impl FnOnce(&mut dyn Iterator<Item = Result<BlockInit, zero::Error>>) -> ParamStore,
    ) -> Engine {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), self.config()).unwrap();
        let lora = LoraSettings {
            r: 8,
            alpha: 16.0,
            dropout: self.dropout,
            target_modules: ModuleSet::Names(self.adapters.iter().map(|p| p.name().into()).collect()),
            modules_to_save: vec![],
            use_rslora: false,
            use_dora: false,
        };
        let has_adapter = !self.adapters.is_empty();
        let quantization = Quantization { quant_type: QuantType::Nf4, double_quant: true };
        let settings = ModelSettings {
            model_name_or_path: String::new(),
            model_revision: "main".into(),
            tokenizer_name_or_path: None,
            chat_template: None,
            chat_template_path: None,
            eos_token: None,
            init_random: true,
            dtype: WeightDtype::Auto,
            quantization: has_adapter.then_some(quantization),
            lora: has_adapter.then_some(lora),
            adapter_name_or_path: None,
        };
        let mut loaded = load(folder.path(), &settings, 5, Purpose::Training, home).unwrap();
        if device.is_cuda() {
            loaded.keep_embedding_on_host();
        }
        // lora_B starts at zero, which would hide half of the adapter.
        let mut blocks = loaded.blocks.enumerate().map(|(index, block)| {
            let mut block = block.unwrap();
            let mut stream = Stream::new(5, "rollout tests", 0, index as u64);
            let values = block.trainable.iter_mut().flat_map(|trainable| &mut trainable.values);
            values.for_each(|value| *value += 0.02 * stream.normal() as f32);
            Ok(block)
        });
        let store = store(&mut blocks);
        Engine::new(loaded.config, loaded.adapter, store, types, Activations::Recompute)
    }
}
