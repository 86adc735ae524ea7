//! Templates against transformers' Jinja2: texts and refusals.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use trainer::data::{ChatTemplate, RenderOptions, SpecialTokens};

use crate::report::Report;

pub(crate) fn run(folder: &Path, report: &mut Report) -> Result<()> {
    let path = folder.join("cases.json");
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let file: Value = serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
    let mut variables = file["context"].as_object().context("context")?.clone();
    let messages = variables.remove("messages").context("messages")?;
    let tools = variables.remove("tools").context("tools")?;
    let options = RenderOptions { add_generation_prompt: true, tools: Some(&tools), variables: Some(&variables) };
    for case in file["cases"].as_array().into_iter().flatten() {
        let source = case["template"].as_str().context("template")?;
        let found = ChatTemplate::new(source, &SpecialTokens::default())
            .and_then(|template| template.render(&messages, options));
        match case["text"].as_str() {
            Some(expected) => report.expect(source, found.as_ref().is_ok_and(|text| text == expected), || {
                format!("gave {found:?}, expected {expected:?}")
            }),
            None => report.expect(source, found.is_err(), || format!("gave {found:?}, expected {}", case["error"])),
        }
    }
    Ok(())
}
