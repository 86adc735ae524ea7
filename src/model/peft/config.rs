//! `adapter_config.json`, with the rules by which PEFT finds modules and their ranks.

use std::fmt;
use std::path::Path;

use fancy_regex::Regex;
use serde_json::{Map, Value, json};

use crate::config::settings::LoraSettings;
use crate::model::Error;
use crate::model::fields::Fields;

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
    /// Only these layers; `None`: all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Ranks of modules whose path ends with a pattern; the first that matches counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Scale numerators of modules whose path ends with a pattern; the first that matches counts.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Scale by `alpha / sqrt(r)` (Kalajdzievski, 2312.03732) instead of `alpha / r`.
    pub use_rslora: bool,
    /// Magnitudes beside the factors (Liu et al., 2402.09353).
    pub use_dora: bool,
    /// Modules trained whole.
    pub modules_to_save: Vec<String>,
    /// Which biases were trained.
    pub bias: AdapterBias,
}

/// A set of modules, as PEFT describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModuleSet {
    /// Modules with one of these names, or whose path ends with `.` and one of them.
    Names(Vec<String>),
    /// Modules whose whole path matches this regular expression.
    Pattern(String),
    /// Every linear module but the head.
    AllLinear,
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

impl ModuleSet {
    fn holds(&self, module: &str) -> Result<bool, Error> {
        match self {
            Self::Names(names) => Ok(names.iter().any(|name| {
                module.strip_suffix(name.as_str()).is_some_and(|before| before.is_empty() || before.ends_with('.'))
            })),
            Self::Pattern(pattern) => matches(&format!("^(?:{pattern})$"), module),
            Self::AllLinear => Ok(module != "lm_head"),
        }
    }
}

/// Whether a regular expression out of an adapter's configuration matches.
fn matches(pattern: &str, module: &str) -> Result<bool, Error> {
    let wrong = |error: fancy_regex::Error| Error::Key {
        path: super::CONFIG_FILE.into(),
        key: "target_modules, exclude_modules, rank_pattern or alpha_pattern".into(),
        found: format!("`{pattern}` ({error})"),
        expected: "a regular expression".into(),
    };
    Regex::new(pattern).map_err(wrong)?.is_match(module).map_err(wrong)
}

/// The value of the first pattern that matches the end of a module's path, as PEFT's `get_pattern_key` finds it.
fn first_match<T: Copy>(patterns: &[(String, T)], module: &str) -> Result<Option<T>, Error> {
    for (pattern, value) in patterns {
        if matches(&format!(r"^(?:.*\.)?(?:{pattern})$"), module)? {
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
            target_modules: ModuleSet::Names(lora.target_modules.iter().map(|p| p.name().into()).collect()),
            exclude_modules: None,
            layers_to_transform: None,
            rank_pattern: vec![],
            alpha_pattern: vec![],
            use_rslora: lora.use_rslora,
            use_dora: false,
            modules_to_save: vec![],
            bias: AdapterBias::None,
        }
    }

    /// Whether a module has an adapter.
    ///
    /// # Errors
    /// If a pattern is no regular expression.
    pub fn targets(&self, module: &str) -> Result<bool, Error> {
        if let Some(excluded) = &self.exclude_modules
            && excluded.holds(module)?
        {
            return Ok(false);
        }
        if !self.target_modules.holds(module)? {
            return Ok(false);
        }
        let layer = module.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        Ok(match (&self.layers_to_transform, layer) {
            (None, _) => true,
            (Some(layers), Some(layer)) => layers.contains(&layer),
            (Some(_), None) => false,
        })
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
        let target_modules = fields
            .modules("target_modules")?
            .ok_or_else(|| fields.wrong("target_modules", "module names, a regular expression or \"all-linear\""))?;
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
            exclude_modules: fields.modules("exclude_modules")?,
            layers_to_transform: fields.layers()?,
            rank_pattern: fields.pattern("rank_pattern", |value| fields.rank("rank_pattern", value))?,
            alpha_pattern: fields.pattern("alpha_pattern", |value| {
                value.as_f64().ok_or_else(|| fields.wrong("alpha_pattern", "an object of patterns and numbers"))
            })?,
            use_rslora: fields.flag("use_rslora")?,
            use_dora: fields.flag("use_dora")?,
            modules_to_save,
            bias,
        })
    }

    /// The content of an `adapter_config.json`, with the keys that PEFT 0.21 writes.
    pub fn to_json(&self) -> Value {
        let optional = |modules: &Option<ModuleSet>| modules.as_ref().map_or(Value::Null, ModuleSet::to_json);
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
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": optional(&self.exclude_modules),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
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
            "target_modules": self.target_modules.to_json(),
            "target_parameters": null,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": null,
            "use_dora": self.use_dora,
            "use_qalora": false,
            "use_rslora": self.use_rslora,
        })
    }
}

impl ModuleSet {
    fn to_json(&self) -> Value {
        match self {
            Self::Names(names) => json!(names),
            Self::Pattern(pattern) => json!(pattern),
            Self::AllLinear => json!("all-linear"),
        }
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
        let rank = value.as_u64().filter(|r| (1..=1 << 20).contains(r));
        rank.map(|r| r as usize).ok_or_else(|| self.wrong(key, "a whole number of at least 1"))
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

    fn layers(&self) -> Result<Option<Vec<usize>>, Error> {
        let key = "layers_to_transform";
        let layer = |value: &Value| {
            value.as_u64().map(|n| n as usize).ok_or_else(|| self.wrong(key, "a layer or a list of layers"))
        };
        match self.get(key) {
            None => return Ok(None),
            Some(_) if self.get("layers_pattern").is_some_and(|p| p != "layers" && *p != json!(["layers"])) => {}
            Some(Value::Array(layers)) => return layers.iter().map(layer).collect::<Result<_, _>>().map(Some),
            Some(one) => return Ok(Some(vec![layer(one)?])),
        }
        Err(self.wrong("layers_pattern", "\"layers\", which is what these models call them"))
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
