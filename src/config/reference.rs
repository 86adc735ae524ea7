//! The reference page of every key, written from the tables that also read them.

use std::fmt::Write as _;

use super::builtin_rewards;
use super::field::{Command, Commands, DefaultValue, Key};
use super::foreign::{FOREIGN_KEYS, ForeignKey, Rule};
use super::keys::KEYS;

/// Every key of both commands, in the order of the page.
#[must_use]
pub fn keys() -> &'static [Key] {
    KEYS
}

/// What one key means, in a few lines of plain text.
///
/// # Errors
/// If there is no such key; the message names the nearest one.
pub fn explain(name: &str) -> Result<String, String> {
    // A name that is a key and a reward, `repetition_penalty`, is both.
    let reward = builtin_rewards::explain(name);
    let Some(key) = KEYS.iter().find(|key| key.name == name) else {
        if let Some(key) = FOREIGN_KEYS.iter().find(|key| key.name == name) {
            return Ok(format!("{name}\n  {}\n", answer(key.rule).replace('`', "")));
        }
        if let Some(reward) = reward {
            return Ok(reward);
        }
        let likeness = |key: &&Key| (strsim::jaro_winkler(name, key.name) * 1e6) as u64;
        let nearest = KEYS.iter().max_by_key(likeness).map_or("", |key| key.name);
        return Err(format!(
            "there is no key `{name}`; the nearest is `{nearest}`, `trainer config --reference` lists all"
        ));
    };
    let commands = match key.commands {
        Commands::Both => format!("{} and {}", Command::Sft, Command::Grpo),
        Commands::Sft => Command::Sft.to_string(),
        Commands::Grpo => Command::Grpo.to_string(),
    };
    let plain = |text: String| text.replace('`', "").replace("\\|", "|");
    let mut text = format!(
        "{}\n  {}\n  takes    {}\n  default  {}\n  used by  {commands}\n",
        key.name,
        key.doc,
        plain(takes(key)),
        plain(default(key.default))
    );
    if name == "reward_funcs" {
        let _ = writeln!(text, "  built in {}; --explain NAME says what each gives", builtin_rewards::names());
    }
    text.push_str(&reward.unwrap_or_default());
    Ok(text)
}

/// What happens to a key that is not ours, in a sentence.
fn answer(rule: Rule) -> String {
    match rule {
        Rule::NoEffect(why) => format!("Accepted without effect: {why}."),
        Rule::Lacking { off, why } => {
            let off = off.first().map_or("null", |off| if off.is_empty() { "\"\"" } else { off });
            format!("Not supported (only {off} is accepted): {why}.")
        }
        Rule::Renamed(to) | Rule::Alias(to) => format!("Read as {to}."),
        Rule::Ambiguous(to) => format!("An error: write {to}."),
        Rule::Entries(table) => {
            format!("A map; its entries: {}.", table.keys.iter().map(inner).collect::<Vec<_>>().join(", "))
        }
    }
}

/// The reference page as Markdown: the text of `docs/config.md`.
#[must_use]
pub fn reference() -> String {
    let mut page = String::from(INTRODUCTION);
    let mut group = "";
    for key in KEYS {
        if key.group != group {
            group = key.group;
            let commands = match key.commands {
                Commands::Both => String::new(),
                Commands::Sft => format!(" (`{}`)", Command::Sft),
                Commands::Grpo => format!(" (`{}`)", Command::Grpo),
            };
            let _ = write!(
                page,
                "\n## {group}{commands}\n\n| key | takes | default | what it does |\n| --- | --- | --- | --- |\n"
            );
        }
        let _ = writeln!(page, "| `{}` | {} | {} | {} |", key.name, takes(key), default(key.default), cell(key.doc));
    }
    page.push_str(REWARDS);
    page.push_str(&builtin_rewards::section());
    page.push_str(FOREIGN);
    section(&mut page, "Other spellings", "Accepted; the key on the right is what they set.", "means", |key| match key
        .rule
    {
        Rule::Alias(of) => Some(format!("`{of}`")),
        _ => None,
    });
    let about = "Older names, and those of other programs: read as the key on the right, with a warning that names it. Two \
                 names for one key are an error where their values differ.";
    section(&mut page, "Other names", about, "read as", |key| match key.rule {
        Rule::Renamed(to) => Some(format!("`{to}`")),
        _ => None,
    });
    let about = "An error that names the key to use: elsewhere these stand for another kind of value.";
    section(&mut page, "Ambiguous names", about, "write", |key| match key.rule {
        Rule::Ambiguous(to) => Some(format!("`{to}`")),
        _ => None,
    });
    let about = "Their entries set the keys in brackets; what has no effect is named in a warning, and anything else is an \
                 error that names the entry.";
    section(&mut page, "Keys that hold settings", about, "entries", |key| match key.rule {
        Rule::Entries(table) => Some(table.keys.iter().map(inner).collect::<Vec<_>>().join(", ")),
        _ => None,
    });
    section(
        &mut page,
        "Accepted without effect",
        "A warning says so at the start of the run; null, false and empty values are passed over.",
        "why it has no effect",
        |key| match key.rule {
            Rule::NoEffect(why) => Some(cell(why)),
            _ => None,
        },
    );
    let about = "An error, unless the key is null or has the value in brackets.";
    section(&mut page, "Not supported", about, "what is missing, what to do", |key| match key.rule {
        Rule::Lacking { off, why } => {
            let off = off.first().filter(|off| !off.is_empty()).map_or(String::new(), |off| format!(" (`{off}`)"));
            Some(format!("{}{off}", cell(why)))
        }
        _ => None,
    });
    page
}

fn section(page: &mut String, title: &str, about: &str, column: &str, cell: impl Fn(&ForeignKey) -> Option<String>) {
    let _ = write!(page, "\n### {title}\n\n{about}\n\n| key | {column} |\n| --- | --- |\n");
    for key in FOREIGN_KEYS {
        if let Some(text) = cell(key) {
            let _ = writeln!(page, "| `{}` | {text} |", key.name);
        }
    }
}

/// An entry of a key that holds settings: its name, and the key it sets or the value it may have.
fn inner(key: &ForeignKey) -> String {
    match key.rule {
        Rule::Alias(to) if to == key.name => format!("`{}`", key.name),
        Rule::Alias(to) => format!("`{}` (`{to}`)", key.name),
        Rule::Lacking { off, .. } => {
            format!("`{}` (only `{}`)", key.name, off.first().copied().filter(|off| !off.is_empty()).unwrap_or("null"))
        }
        _ => format!("`{}` (no effect)", key.name),
    }
}

fn takes(key: &Key) -> String {
    let mut text = key.kind.to_owned();
    if !key.values.is_empty() {
        let values: Vec<_> = key.values.iter().map(|value| format!("`{value}`")).collect();
        let _ = write!(text, " {}", values.join(", "));
    }
    let range = key.range.to_string();
    if !range.is_empty() {
        let _ = write!(text, ", {range}");
    }
    if !key.unit.is_empty() {
        let _ = write!(text, " ({})", key.unit);
    }
    cell(&text)
}

fn default(default: DefaultValue) -> String {
    match default {
        DefaultValue::Required => "**required**".into(),
        DefaultValue::Text(text) => format!("`{text}`"),
        DefaultValue::PerCommand { sft, grpo } => format!("`{sft}` (sft), `{grpo}` (grpo)"),
        DefaultValue::Derived(text) => cell(text),
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

const INTRODUCTION: &str = "\
# Config reference

<!-- Written by `config::reference()`; `UPDATE_DOCS=1 cargo test --release --test config` writes it anew. -->

`trainer sft FILE` and `trainer grpo FILE` read one flat YAML file. Keys have the names, meanings and defaults of
TRL 1.16 (`SFTConfig`, `GRPOConfig`, `ModelConfig`, `ScriptArguments`) and of transformers 5.24 (`TrainingArguments`);
where a default differs, the key says so and why. Everything that is wrong with a file is reported at once, with its
line; the exit code is then 2.

- `--set key=value` replaces what the file says for a key; it can be given several times, the value is YAML, and of
  two for one key the later one counts.
- Numbers are read the same way whatever the YAML version: `1e-5` is a number. A number in quotes is a number where
  one is wanted. A leading zero (`010`) is an error, since YAML 1.1 and 1.2 disagree about it.
- `null` or an empty value means \"not given\" for keys whose default is `null` or worked out from others.
- Any other key may be null as well: a warning says that its default is taken.
- Paths are relative to the working directory; a leading `~` or `~name` is a home folder.
- `output_dir/config.resolved.yaml` holds every key with its value; the same command with that file gives the same run.
";

const REWARDS: &str = "
## Reward functions

`reward_funcs` is a list; each entry is one of

```yaml
reward_funcs:
  - accuracy                                # a built-in, by name
  - {kind: accuracy, PARAMETER: VALUE}      # a built-in with parameters
  - my_rewards.py:brevity                   # a function in a Python file
  - my_package.rewards.score                # a function in a Python module, as TRL names it
  - kind: my_rewards.py:brevity             # the same with all its keys
    name: short                             # in metrics: rewards/short/mean; default: the function's `__name__`, as in TRL
    timeout_secs: 600                       # seconds one batch may take; default 600
    limit: 200                              # any other key is a keyword argument of every call
  - command: python3 style.py --strict      # a program; quotes work as in a shell, no shell is run
  - kind: command                           # the same with all its keys
    name: style                             # in metrics: rewards/style/mean; default: the script's or program's name
    command: [python3, style.py, --strict]
    timeout_secs: 60                        # seconds one batch may take; default 60
```

Names must differ, since metrics are filed under them.

### Functions in Python

They are called as TRL 1.16 calls them: `prompts`, `completions` and `completion_ids` (lists), every other column of the
data set (a list each), `trainer_state`, `log_extra` and `log_metric`, all as keyword arguments; one value per completion
comes back, a number, a truth value, or `None` (or NaN) where the reward does not apply. Where the data set's prompts are
lists of messages, completions are `[{\"role\": \"assistant\", \"content\": ...}]`, else texts. Functions, `async` functions
(they run side by side), objects that can be called and `functools.partial` are taken, arrays and tensors as results too. A
function without `**kwargs` gets the arguments that it names. `trainer_state` has `global_step`, `max_steps`, `epoch`,
`num_train_epochs` and `train_batch_size`. `scripts/rewards/functions.py` has examples.

One Python runs all functions of a run; it needs 3.8 or later and no packages but those that the functions import. It is
started and imports them before the model is loaded. Files and modules are looked for in the working directory, then in the
folder of the configuration, then in `reward_path`. What functions print is shown with `TRAINER_LOG=info`. An exception ends
the run with its traceback; so do a result that is no list of numbers and a call that takes longer than `timeout_secs`.
Functions of `trl.rewards` and `open_r1.rewards` that are built in here (`trl.rewards.think_format_reward`) need neither
package.

### Programs

A program answers each line of samples with a line of scores, as `scripts/rewards/brevity.py` does: numbers, truth values,
or `null` (or NaN) where the reward does not apply. Other lines on its standard output are passed over, which is said once;
its standard error is free, its last lines are shown if it fails. It ends the run to give an infinite score, another number
of scores than samples, an answer to another request or none in time; it is started again by the next run only. Programs,
functions and whatever processes they start end with the trainer, however that ends.
";

const FOREIGN: &str = "
## Keys of TRL and transformers that are not listed above
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_its_row() {
        let page = reference();
        for key in KEYS {
            assert!(page.contains(&format!("\n| `{}` | ", key.name)), "{}", key.name);
        }
        for key in FOREIGN_KEYS {
            assert!(page.contains(&format!("\n| `{}` | ", key.name)), "{}", key.name);
        }
    }

    #[test]
    fn keys_of_others_are_explained_too() {
        for (name, part) in [
            ("vllm_device", "without effect: the rollout"),
            ("load_in_8bit", "only false is accepted"),
            ("max_seq_length", "Read as max_length."),
            ("generation_kwargs", "stop (stop_strings)"),
        ] {
            assert!(explain(name).is_ok_and(|text| text.contains(part)), "{name}: {:?}", explain(name));
        }
        assert!(explain("learning_rte").is_err_and(|error| error.contains("`learning_rate`")));
    }

    #[test]
    fn rows_have_four_cells() {
        for line in reference().lines().filter(|line| line.starts_with("| `")) {
            let bars = line.replace("\\|", "").matches('|').count();
            assert!(bars == 5 || bars == 3, "{line}");
        }
    }
}
