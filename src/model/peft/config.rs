//! `adapter_config.json`, with the rules by which PEFT finds modules and their ranks.

use std::fmt;
use std::path::Path;

use fancy_regex::Regex;
use serde_json::{Map, Value, json};

use super::modules::{EMBED_TOKENS, LM_HEAD};
use crate::config::settings::{LoraSettings, ModuleSet};
use crate::model::Error;
use crate::model::fields::Fields;

/// The largest rank that is believed; larger ones come from damaged files.
const LARGEST_RANK: u64 = 1 << 14;

/// The settings of a low-rank adapter, under PEFT's names.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The model the adapter was trained on, for whoever reads the file.
    pub base_model_name_or_path: Option<String>,
    /// Rank, where `rank_pattern` gives no other.
    pub r: usize,
    /// Scale numerator, where `alpha_pattern` gives no other.
    pub lora_alpha: f64,
    /// Probability of dropping an input element of the adapter in training.
    pub lora_dropout: f64,
    /// Modules with an adapter.
    pub target_modules: ModuleSet,
    /// Modules without one although they are targeted.
    pub exclude_modules: Option<ModuleSet>,
    /// Of modules that are targeted by the end of their path, only those in these layers; `None`: all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// What stands before a layer's number in a path, as regular expressions; empty: anything.
    pub layers_pattern: Vec<String>,
    /// Ranks of modules whose path ends with a pattern; the first that matches counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Scale numerators of modules whose path ends with a pattern; the first that matches counts.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Scale by `alpha / sqrt(r)` (Kalajdzievski, 2312.03732) instead of `alpha / r`.
    pub use_rslora: bool,
    /// Magnitudes beside the factors (Liu et al., 2402.09353).
    pub use_dora: bool,
    /// Modules trained whole; they have no adapter, whatever is targeted.
    pub modules_to_save: Vec<String>,
    /// Whether the embedding and a tied head stay one matrix where they are adapted or trained whole.
    pub ensure_weight_tying: bool,
    /// Which biases were trained.
    pub bias: AdapterBias,
}

/// Which biases an adapter trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterBias {
    /// None.
    None,
    /// All of the model.
    All,
    /// Those of adapted modules.
    LoraOnly,
}

impl fmt::Display for ModuleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Names(names) => write!(f, "{}", names.join(", ")),
            Self::Pattern(pattern) => write!(f, "`{pattern}`"),
            Self::AllLinear => f.write_str("all-linear"),
        }
    }
}

/// Whether a name is a module's path or its end.
fn is_named(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Whether a set of modules has this one.
fn holds(set: &ModuleSet, module: &str) -> Result<bool, Error> {
    match set {
        ModuleSet::Names(names) => Ok(names.iter().any(|name| is_named(module, name))),
        ModuleSet::Pattern(pattern) => matches(&format!("^(?:{pattern})$"), module),
        ModuleSet::AllLinear => Ok(module != LM_HEAD && module != EMBED_TOKENS),
    }
}

/// Whether a regular expression out of an adapter's configuration matches.
fn matches(pattern: &str, module: &str) -> Result<bool, Error> {
    let regex = Regex::new(pattern).map_err(|error| bad_pattern(pattern, &error))?;
    regex.is_match(module).map_err(|error| bad_pattern(pattern, &error))
}

fn bad_pattern(pattern: &str, error: &fancy_regex::Error) -> Error {
    Error::Key {
        path: super::CONFIG_FILE.into(),
        key: "a pattern of target_modules, exclude_modules, layers_pattern, rank_pattern or alpha_pattern".into(),
        found: format!("`{pattern}` ({error})"),
        expected: "a regular expression".into(),
    }
}

/// The value of the first pattern that matches the end of a module's path, as PEFT's `get_pattern_key` finds it.
fn first_match<T: Copy>(patterns: &[(String, T)], module: &str) -> Result<Option<T>, Error> {
    for (pattern, value) in patterns {
        // Groups as there, so that a reference to one means the same.
        if matches(&format!(r"^(.*\.)?({pattern})$"), module)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

impl AdapterConfig {
    /// The configuration of a fresh adapter.
    pub fn new(lora: &LoraSettings, base_model_name_or_path: Option<&str>) -> Self {
        Self {
            base_model_name_or_path: base_model_name_or_path.map(Into::into),
            r: lora.r,
            lora_alpha: lora.alpha,
            lora_dropout: lora.dropout,
            target_modules: lora.target_modules.clone(),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: vec![],
            rank_pattern: vec![],
            alpha_pattern: vec![],
            use_rslora: lora.use_rslora,
            use_dora: lora.use_dora,
            modules_to_save: lora.modules_to_save.clone(),
            ensure_weight_tying: false,
            bias: AdapterBias::None,
        }
    }

    /// Whether a module has an adapter, by the rules of PEFT's `check_target_module_exists`.
    ///
    /// # Errors
    /// If a pattern is no regular expression.
    pub fn targets(&self, module: &str) -> Result<bool, Error> {
        let is_excluded = match &self.exclude_modules {
            None => false,
            Some(excluded) => holds(excluded, module)?,
        };
        if is_excluded || self.is_inside_saved(module)? {
            return Ok(false);
        }
        match &self.target_modules {
            // A whole path is meant whatever its layer.
            ModuleSet::Names(names) if !names.iter().any(|name| name == module) => {
                Ok(names.iter().any(|name| is_named(module, name)) && self.is_in_layers(module)?)
            }
            set => holds(set, module),
        }
    }

    /// Whether a module is one that is trained whole, or inside of one.
    fn is_inside_saved(&self, module: &str) -> Result<bool, Error> {
        for name in &self.modules_to_save {
            if matches(&format!(r"^(?:|.*\.){name}(?:$|\..*)"), module)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn is_in_layers(&self, module: &str) -> Result<bool, Error> {
        let Some(layers) = &self.layers_to_transform else { return Ok(true) };
        let any = [r"[^.]*".to_string()];
        // Without a pattern the layers' name has something before it; both take the first number.
        let (start, patterns) = if self.layers_pattern.is_empty() {
            (r".*?\.", &any[..])
        } else {
            (r"(?:|.*?\.)", &self.layers_pattern[..])
        };
        for pattern in patterns {
            let wrong = |error| bad_pattern(pattern, &error);
            let regex = Regex::new(&format!(r"^{start}{pattern}\.(?P<idx>\d+)\.")).map_err(wrong)?;
            if let Some(found) = regex.captures(module).map_err(wrong)? {
                let layer = found.name("idx").and_then(|layer| layer.as_str().parse().ok());
                return Ok(layer.is_some_and(|layer: usize| layers.contains(&layer)));
            }
        }
        Ok(false)
    }

    /// The rank of a module's adapter, and what multiplies B A.
    ///
    /// # Errors
    /// If a pattern is no regular expression.
    pub fn rank_and_scaling(&self, module: &str) -> Result<(usize, f64), Error> {
        let r = first_match(&self.rank_pattern, module)?.unwrap_or(self.r);
        let alpha = first_match(&self.alpha_pattern, module)?.unwrap_or(self.lora_alpha);
        let divisor = if self.use_rslora { (r as f64).sqrt() } else { r as f64 };
        Ok((r, alpha / divisor))
    }

    /// Reads the content of an `adapter_config.json`; `path` is what messages call it.
    ///
    /// # Errors
    /// If a key has the wrong type, or asks for a kind of adapter that is not supported.
    pub fn from_json(path: &Path, content: &Value) -> Result<Self, Error> {
        let fields = Fields::of_file(path, content)?;
        fields.refuse_other_adapters()?;
        let r = fields.rank("r", fields.object.get("r").unwrap_or(&Value::Null))?;
        let lora_alpha = fields.number("lora_alpha")?.ok_or_else(|| fields.wrong("lora_alpha", "a number"))?;
        let lora_dropout = fields.number("lora_dropout")?.unwrap_or(0.0);
        if !(0.0..1.0).contains(&lora_dropout) {
            return Err(fields.wrong("lora_dropout", "a number of at least 0 and less than 1"));
        }
        // PEFT takes its choice for the model where the file is silent.
        let target_modules = fields.modules("target_modules")?.unwrap_or_else(ModuleSet::of_qwen);
        let layers_to_transform = fields.layers()?;
        if layers_to_transform.is_some() && !matches!(target_modules, ModuleSet::Names(_)) {
            return Err(fields.wrong("layers_to_transform", "null where `target_modules` is a text"));
        }
        let bias = match fields.get("bias").map(|b| b.as_str().unwrap_or("?")) {
            None | Some("none") => AdapterBias::None,
            Some("all") => AdapterBias::All,
            Some("lora_only") => AdapterBias::LoraOnly,
            Some(_) => return Err(fields.wrong("bias", "\"none\", \"all\" or \"lora_only\"")),
        };
        let modules_to_save = match fields.get("modules_to_save") {
            None => vec![],
            Some(_) => fields.strings("modules_to_save")?,
        };
        Ok(Self {
            base_model_name_or_path: fields.get("base_model_name_or_path").and_then(Value::as_str).map(Into::into),
            r,
            lora_alpha,
            lora_dropout,
            target_modules,
            exclude_modules: match fields.modules("exclude_modules")? {
                Some(ModuleSet::AllLinear) => Some(ModuleSet::Pattern("all-linear".into())),
                other => other,
            },
            layers_to_transform,
            layers_pattern: fields.names("layers_pattern")?,
            rank_pattern: fields.pattern("rank_pattern", |value| fields.rank("rank_pattern", value))?,
            alpha_pattern: fields.pattern("alpha_pattern", |value| {
                value.as_f64().ok_or_else(|| fields.wrong("alpha_pattern", "an object of patterns and numbers"))
            })?,
            use_rslora: fields.flag("use_rslora")?,
            use_dora: fields.flag("use_dora")?,
            modules_to_save,
            ensure_weight_tying: fields.flag("ensure_weight_tying")?,
            bias,
        })
    }

    /// The content of an `adapter_config.json`, with the keys that PEFT 0.21 writes.
    pub fn to_json(&self) -> Value {
        let optional = |modules: &Option<ModuleSet>| modules.as_ref().map_or(Value::Null, set_to_json);
        json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": self.alpha_pattern.iter().map(|(k, v)| (k.clone(), number(*v))).collect::<Map<_, _>>(),
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": match self.bias {
                AdapterBias::None => "none",
                AdapterBias::All => "all",
                AdapterBias::LoraOnly => "lora_only",
            },
            "corda_config": null,
            "ensure_weight_tying": self.ensure_weight_tying,
            "eva_config": null,
            "exclude_modules": optional(&self.exclude_modules),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": if self.layers_pattern.is_empty() { Value::Null } else { json!(self.layers_pattern) },
            "layers_to_transform": self.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": number(self.lora_alpha),
            "lora_bias": false,
            "lora_dropout": self.lora_dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": if self.modules_to_save.is_empty() { Value::Null } else { json!(self.modules_to_save) },
            "peft_type": "LORA",
            "peft_version": "0.21.2",
            "qalora_group_size": 16,
            "r": self.r,
            "rank_pattern": self.rank_pattern.iter().map(|(k, v)| (k.clone(), json!(v))).collect::<Map<_, _>>(),
            "revision": null,
            "target_modules": set_to_json(&self.target_modules),
            "target_parameters": null,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": null,
            "use_dora": self.use_dora,
            "use_qalora": false,
            "use_rslora": self.use_rslora,
        })
    }
}

fn set_to_json(set: &ModuleSet) -> Value {
    match set {
        ModuleSet::Names(names) => json!(names),
        ModuleSet::Pattern(pattern) => json!(pattern),
        ModuleSet::AllLinear => json!("all-linear"),
    }
}

/// A number as Python writes it: without a point where it is whole.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

impl Fields<'_> {
    fn flag(&self, key: &str) -> Result<bool, Error> {
        Ok(self.boolean(key)?.unwrap_or(false))
    }

    fn rank(&self, key: &str, value: &Value) -> Result<usize, Error> {
        let rank = value.as_u64().filter(|r| (1..=LARGEST_RANK).contains(r));
        rank.map(|r| r as usize).ok_or_else(|| self.wrong(key, "a whole number from 1 to 16384"))
    }

    fn strings(&self, key: &str) -> Result<Vec<String>, Error> {
        let list = self.get(key).and_then(Value::as_array);
        list.and_then(|list| list.iter().map(|name| name.as_str().map(Into::into)).collect())
            .ok_or_else(|| self.wrong(key, "a list of names"))
    }

    fn modules(&self, key: &str) -> Result<Option<ModuleSet>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(all)) if all.eq_ignore_ascii_case("all-linear") => Ok(Some(ModuleSet::AllLinear)),
            Some(Value::String(pattern)) => {
                // Compiled here so that a bad pattern is found where its file is known.
                Regex::new(pattern).map_err(|_| self.wrong(key, "module names or a regular expression"))?;
                Ok(Some(ModuleSet::Pattern(pattern.clone())))
            }
            Some(_) => self.strings(key).map(|names| Some(ModuleSet::Names(names))),
        }
    }

    /// The layers of `layers_to_transform`; an empty list is none, as in PEFT.
    fn layers(&self) -> Result<Option<Vec<usize>>, Error> {
        let key = "layers_to_transform";
        let layer = |value: &Value| {
            value.as_u64().map(|n| n as usize).ok_or_else(|| self.wrong(key, "a layer or a list of layers"))
        };
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(layers)) if layers.is_empty() => Ok(None),
            Some(Value::Array(layers)) => layers.iter().map(layer).collect::<Result<_, _>>().map(Some),
            Some(one) => Ok(Some(vec![layer(one)?])),
        }
    }

    /// One text or a list of them, each a regular expression.
    fn names(&self, key: &str) -> Result<Vec<String>, Error> {
        let names = match self.get(key) {
            None => return Ok(vec![]),
            Some(Value::String(one)) if one.is_empty() => return Ok(vec![]),
            Some(Value::String(one)) => vec![one.clone()],
            Some(_) => self.strings(key)?,
        };
        match names.iter().find(|name| Regex::new(name).is_err()) {
            None => Ok(names),
            Some(_) => Err(self.wrong(key, "a regular expression or a list of them")),
        }
    }

    fn pattern<T>(&self, key: &str, value: impl Fn(&Value) -> Result<T, Error>) -> Result<Vec<(String, T)>, Error> {
        let Some(object) = self.get(key) else { return Ok(vec![]) };
        let object = object.as_object().ok_or_else(|| self.wrong(key, "an object of patterns and numbers"))?;
        object
            .iter()
            .map(|(pattern, number)| {
                Regex::new(pattern).map_err(|_| self.wrong(key, "an object of regular expressions and numbers"))?;
                Ok((pattern.clone(), value(number)?))
            })
            .collect()
    }

    fn refuse_other_adapters(&self) -> Result<(), Error> {
        match self.get("peft_type").map(|t| t.as_str().unwrap_or("?")) {
            Some("LORA") => {}
            None => return Err(self.wrong("peft_type", "\"LORA\"")),
            Some(other) => return Err(self.unsupported(format!("an adapter of type {other}"), "LORA")),
        }
        // Each of these changes what the adapter computes or what it is added to.
        for key in [
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "layer_replication",
            "lora_bias",
            "megatron_config",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        ] {
            let is_off = self.get(key).is_none_or(|v| match v {
                Value::Bool(on) => !on,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                _ => false,
            });
            if !is_off {
                return Err(self.unsupported(format!("`{key}`"), "LoRA, rsLoRA and DoRA without it"));
            }
        }
        match self.get("init_lora_weights") {
            // These leave the base weights alone; what they put into A and B is in the file.
            None | Some(Value::Bool(_)) => Ok(()),
            Some(Value::String(s)) if matches!(s.as_str(), "gaussian" | "eva" | "orthogonal") => Ok(()),
            Some(other) => Err(self.unsupported(
                format!("`init_lora_weights: {other}`, which changes the base weights as well"),
                "true, false, gaussian, eva and orthogonal; convert the adapter with PEFT's \
                 `path_initial_model_for_weight_conversion`",
            )),
        }
    }
}
