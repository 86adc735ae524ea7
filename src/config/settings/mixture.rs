//! Several data sets that are read as one.

/// Several data sets that are read as one.
#[derive(Clone, Debug, PartialEq)]
pub struct MixtureSettings {
    /// The data sets, in their order.
    pub parts: Vec<MixturePart>,
    /// Draws the rows of parts with a weight, the order of all rows and the evaluation rows.
    pub seed: u64,
    /// Whether the rows of all parts are shuffled (open-r1) or follow one another (TRL).
    pub is_shuffled: bool,
    /// Rows held out for evaluation: a share below 1, or a number.
    pub test_split_size: Option<f64>,
    /// The YAML it was read from: key and value.
    pub text: (&'static str, String),
}

/// One data set of a mixture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MixturePart {
    /// A data file, a folder of them, a hub id, or a format (`json`) with `data_files`.
    pub path: String,
    /// Configuration.
    pub config: Option<String>,
    /// Branch, tag or commit of a hub id.
    pub revision: String,
    /// Folder inside of the data set.
    pub data_dir: Option<String>,
    /// Splits and the patterns of their files; empty to find them by name.
    pub data_files: Vec<(String, Vec<String>)>,
    /// Which rows: `train`, `train[:10%]`, `train_sft+train_gen`.
    pub split: String,
    /// Columns that are kept.
    pub columns: Option<Vec<String>>,
    /// How many of the rows.
    pub share: Share,
}

/// How many rows of a data set a mixture takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Share {
    /// All.
    #[default]
    All,
    /// This share of its own rows, drawn at random (open-r1).
    Weight(f64),
    /// Its first rows, so many that they are this share of the mixture (TRL).
    Fraction(f64),
}
