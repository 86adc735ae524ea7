//! One logged row as one line: known metrics in a fixed order, each with its unit, in columns that line up.

use serde_json::Value;

use super::Row;
use super::units;

/// How a number is written.
#[derive(Clone, Copy)]
enum Form {
    /// This many decimals.
    Fixed(usize),
    /// One decimal of a mantissa and an exponent.
    Exponent,
    /// A share as a percentage.
    Percent,
    /// Thousands and millions in short.
    Count,
}

/// A metric the console shows: key, label before it, unit after it, form. First things first: what does not fit into
/// the width of a terminal is left out from the end (every number is in metrics.jsonl).
const COLUMNS: &[(&str, &str, &str, Form)] = &[
    ("loss", "loss", "", Form::Fixed(4)),
    ("reward", "reward", "", Form::Fixed(3)),
    ("reward_std", "±", "", Form::Fixed(3)),
    ("mean_token_accuracy", "accuracy", "", Form::Percent),
    ("kl", "kl", "nats", Form::Fixed(4)),
    ("entropy", "entropy", "nats", Form::Fixed(3)),
    ("completions/mean_length", "length", "tok", Form::Fixed(1)),
    ("completions/clipped_ratio", "cut off", "", Form::Percent),
    ("grad_norm", "grad", "", Form::Fixed(3)),
    ("learning_rate", "lr", "", Form::Exponent),
    ("step_time", "", "s/step", Form::Fixed(2)),
    ("tokens_per_second", "", "tok/s", Form::Count),
    ("num_tokens", "seen", "tok", Form::Count),
    ("epoch", "epoch", "", Form::Fixed(2)),
];

/// The row as a line of at most `width` columns where one is given. `total` is the number of optimizer steps.
pub(super) fn render(row: &Row, total: Option<u64>, width: Option<usize>) -> String {
    let prefix = if row.keys().any(|key| key.starts_with("eval_")) { "eval_" } else { "" };
    let step = row.get("step").and_then(Value::as_u64).unwrap_or(0);
    let head = if prefix.is_empty() { "step" } else { "eval" };
    let mut line = match total {
        Some(total) => {
            let digits = total.to_string().len();
            format!("{head} {step:>digits$}/{total}")
        }
        None => format!("{head} {step}"),
    };
    for (key, label, unit, form) in COLUMNS {
        let Some(value) = row.get(&format!("{prefix}{key}")).or_else(|| row.get(*key).filter(|_| *key == "epoch"))
        else {
            continue;
        };
        let is_spread = *key == "reward_std";
        let number = number(value, *form);
        let number = if is_spread { number.trim_start() } else { &number };
        let cell = [*label, number, *unit].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
        // The spread belongs to the reward before it.
        let gap = if is_spread { " " } else { "  " };
        let cell_width = console::measure_text_width(&cell) + gap.len();
        if width.is_some_and(|width| console::measure_text_width(&line) + cell_width > width) {
            break;
        }
        line.push_str(gap);
        line.push_str(&cell);
    }
    line
}

/// A number in the width of its form, so that columns line up from row to row. Null is how a row says NaN.
fn number(value: &Value, form: Form) -> String {
    let Some(value) = value.as_f64() else { return format!("{:>6}", "nan") };
    match form {
        Form::Fixed(decimals) => {
            let width = decimals + 3;
            format!("{value:>width$.decimals$}")
        }
        Form::Exponent => format!("{value:>7.1e}"),
        Form::Percent => format!("{:>7}", units::percent(value)),
        Form::Count => format!("{:>5}", units::short_count(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(value: &Value) -> Row {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_step_reads_as_one_line_with_units_and_columns_that_line_up() {
        let first = row(&json!({"step": 5, "epoch": 0.1, "loss": 0.01234, "grad_norm": 0.5, "learning_rate": 1e-5,
            "reward": 0.25, "reward_std": 0.43, "kl": 0.001, "entropy": 1.25, "completions/mean_length": 48.25,
            "num_tokens": 12345, "step_time": 1.5, "something_else": 3.0}));
        let line = render(&first, Some(100), None);
        assert_eq!(
            line,
            "step   5/100  loss  0.0123  reward  0.250 ± 0.430  kl  0.0010 nats  entropy  1.250 nats  length 48.2 tok  \
             grad  0.500  lr  1.0e-5   1.50 s/step  seen 12.3k tok  epoch  0.10"
        );
        let mut second = first;
        second.insert("step".into(), json!(100));
        second.insert("loss".into(), json!(-0.5));
        second.insert("reward".into(), Value::Null);
        let other = render(&second, Some(100), None);
        assert_eq!(other.find("entropy"), line.find("entropy"), "\n{line}\n{other}");
        assert!(other.contains("reward    nan"), "{other}");
    }

    #[test]
    fn an_evaluation_row_and_a_narrow_terminal() {
        let eval = row(&json!({"step": 10, "epoch": 1.0, "eval_loss": 2.0, "eval_mean_token_accuracy": 0.5}));
        assert_eq!(render(&eval, None, None), "eval 10  loss  2.0000  accuracy  50.0 %  epoch  1.00");
        let narrow = render(&eval, None, Some(30));
        assert_eq!(narrow, "eval 10  loss  2.0000");
    }
}
