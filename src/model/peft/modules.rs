//! The modules of a model, by Hugging Face's paths: which can have an adapter, which an adapter's configuration means.

use std::collections::{BTreeMap, BTreeSet};

use super::AdapterConfig;
use crate::config::settings::Projection;
use crate::model::Error;
use crate::model::config::{ModelConfig, TensorRole, TensorShape};

/// The head's module.
pub const LM_HEAD: &str = "lm_head";
/// The token embedding's module.
pub const EMBED_TOKENS: &str = "model.embed_tokens";

/// Every module that can carry a low-rank adapter, with `(out, in)`, sorted by path. The embedding's inputs are the tokens.
pub(super) fn adaptable(model: &ModelConfig) -> BTreeMap<String, (usize, usize)> {
    let mut modules = BTreeMap::new();
    for layer in 0..model.num_hidden_layers {
        for projection in Projection::ALL {
            modules.insert(format!("model.layers.{layer}.{}", projection.path()), model.projection_shape(projection));
        }
    }
    modules.insert(LM_HEAD.into(), (model.vocab_size, model.hidden_size));
    modules.insert(EMBED_TOKENS.into(), (model.hidden_size, model.vocab_size));
    modules
}

/// What [`adaptable`] lists, for a message.
pub(super) fn described(model: &ModelConfig) -> String {
    let last = model.num_hidden_layers - 1;
    let names = Projection::ALL.map(Projection::path).join(", ");
    format!("{names} of model.layers.0 to model.layers.{last}; {LM_HEAD} and {EMBED_TOKENS}")
}

/// A module's path, and `(out, in)`.
type Adapted = (String, (usize, usize));

impl AdapterConfig {
    /// The modules of a model that these settings give an adapter.
    ///
    /// # Errors
    /// If the targets are a pattern that is no regular expression.
    pub fn adapted(&self, model: &ModelConfig) -> Result<Vec<Adapted>, Error> {
        let mut found = Vec::new();
        for (module, shape) in adaptable(model) {
            if self.targets(&module)? {
                found.push((module, shape));
            }
        }
        Ok(found)
    }

    /// The weights that `modules_to_save` means: those of every module whose path ends with one of its names, as PEFT's
    /// `_set_trainable` finds them, and of the modules inside those. The head of a tied model is among them by its own name.
    ///
    /// # Errors
    /// If a name is the end of no module's path.
    pub fn saved_whole(&self, model: &ModelConfig) -> Result<Vec<TensorShape>, Error> {
        let mut tensors = model.tensors();
        if model.tie_word_embeddings {
            let shape = vec![model.vocab_size, model.hidden_size];
            tensors.push(TensorShape { name: format!("{LM_HEAD}.weight"), shape, role: TensorRole::Head });
        }
        let mut found = BTreeSet::new();
        tensors.retain(|tensor| {
            let modules = tensor.name.match_indices('.').map(|(end, _)| &tensor.name[..end]);
            let mut is_saved = false;
            for module in modules {
                for name in self.modules_to_save.iter().filter(|name| module.ends_with(name.as_str())) {
                    found.insert(name.clone());
                    is_saved = true;
                }
            }
            is_saved
        });
        match self.modules_to_save.iter().find(|name| !found.contains(*name)) {
            None => Ok(tensors),
            Some(name) => Err(Error::NoModule {
                key: "modules_to_save",
                found: format!("`{name}`"),
                there_are: format!("{}; and norms, e.g. input_layernorm and model.norm", described(model)),
            }),
        }
    }

    /// Names among the targets that are no module of this model, while others are.
    ///
    /// # Errors
    /// If a pattern is no regular expression.
    pub fn idle_targets(&self, model: &ModelConfig) -> Result<Vec<String>, Error> {
        let super::ModuleSet::Names(names) = &self.target_modules else { return Ok(vec![]) };
        let modules = adaptable(model);
        let mut idle = vec![];
        for name in names {
            let alone = Self { target_modules: super::ModuleSet::Names(vec![name.clone()]), ..self.clone() };
            let mut is_idle = true;
            for module in modules.keys() {
                is_idle &= !alone.targets(module)?;
            }
            if is_idle {
                idle.push(name.clone());
            }
        }
        Ok(idle)
    }
}
