use std::path::Path;

use crate::report::Report;

pub fn run(_folder: &Path, _report: &mut Report) -> anyhow::Result<()> {
    anyhow::bail!("unwritten")
}
