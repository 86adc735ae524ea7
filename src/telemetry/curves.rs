//! Draws the curves of a run as one SVG: small multiples over the optimizer step.
//!
//! Panels appear for the metrics that the run logged. With many rows a panel shows every row thinly and their moving
//! average thickly. SVG text needs no font files, so this works without a display and on a bare machine.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use serde_json::Value;

use super::{Error, Row};

const PANEL: (u32, u32) = (400, 260);
const HEADER: u32 = 64;
const MARGIN: u32 = 16;
/// From this many points on a moving average is drawn over them.
const SMOOTHED_FROM: usize = 30;

const INK: RGBColor = RGBColor(36, 41, 47);
const QUIET: RGBColor = RGBColor(110, 119, 129);
const RULE: RGBColor = RGBColor(228, 232, 236);
const PALETTE: [RGBColor; 6] = [
    RGBColor(0, 109, 176),
    RGBColor(214, 96, 32),
    RGBColor(34, 134, 82),
    RGBColor(148, 84, 176),
    RGBColor(176, 128, 0),
    RGBColor(90, 100, 112),
];

/// A panel to draw when one of its metrics was logged: title with unit, metrics (key, label), band around the first.
struct Layout {
    title: &'static str,
    metrics: &'static [(&'static str, &'static str)],
    band: Option<Band>,
}

/// What the shaded band around a panel's first metric shows.
#[derive(Clone, Copy)]
enum Band {
    /// Plus and minus this metric.
    Spread(&'static str),
    /// From this metric to that one.
    Between(&'static str, &'static str),
}

const LAYOUTS: &[Layout] = &[
    Layout {
        title: "Reward (mean ± standard deviation)",
        metrics: &[("reward", "training"), ("eval_reward", "evaluation")],
        band: Some(Band::Spread("reward_std")),
    },
    Layout { title: "Loss", metrics: &[("loss", "training"), ("eval_loss", "evaluation")], band: None },
    Layout {
        title: "KL to the reference (nats)",
        metrics: &[("kl", "training"), ("eval_kl", "evaluation")],
        band: None,
    },
    Layout { title: "Entropy (nats)", metrics: &[("entropy", "training"), ("eval_entropy", "evaluation")], band: None },
    Layout {
        title: "Completion length (tokens; mean, min to max)",
        metrics: &[("completions/mean_length", "training"), ("eval_completions/mean_length", "evaluation")],
        band: Some(Band::Between("completions/min_length", "completions/max_length")),
    },
    Layout {
        title: "Token accuracy",
        metrics: &[("mean_token_accuracy", "training"), ("eval_mean_token_accuracy", "evaluation")],
        band: None,
    },
    Layout { title: "Gradient norm", metrics: &[("grad_norm", "training")], band: None },
    Layout { title: "Learning rate", metrics: &[("learning_rate", "training")], band: None },
];

type Point = (f64, f64);

struct Panel {
    title: String,
    series: Vec<Series>,
    /// Lower and upper end at each step.
    band: Vec<(f64, f64, f64)>,
}

struct Series {
    label: String,
    points: Vec<Point>,
}

/// Draws the rows of a run (as in metrics.jsonl) into `path`. Returns whether there was anything to draw: at least one
/// metric with two points.
///
/// # Errors
/// If the picture cannot be drawn or written.
pub fn write_curves(path: &Path, title: &str, rows: &[Row]) -> Result<bool, Error> {
    let panels = panels(rows);
    if panels.is_empty() {
        return Ok(false);
    }
    let text = draw(title, &panels).map_err(|reason| Error::Draw { path: path.into(), reason: reason.to_string() })?;
    crate::fs::write_atomic(path, text.as_bytes())?;
    Ok(true)
}

fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = LAYOUTS
        .iter()
        .filter_map(|layout| {
            let series: Vec<Series> = layout
                .metrics
                .iter()
                .map(|(key, label)| Series { label: (*label).into(), points: points(rows, key) })
                .filter(|series| !series.points.is_empty())
                .collect();
            let has_line = series.iter().any(|series| series.points.len() > 1);
            let band = layout.band.map_or_else(Vec::new, |band| band_of(rows, layout.metrics[0].0, band));
            has_line.then(|| Panel { title: layout.title.into(), series, band })
        })
        .collect();
    let parts = reward_parts(rows);
    if parts.len() > 1 {
        let after_reward = usize::from(panels.first().is_some_and(|panel| panel.title.starts_with("Reward")));
        panels.insert(after_reward, Panel { title: "Reward by function".into(), series: parts, band: Vec::new() });
    }
    panels
}

fn step_of(row: &Row) -> Option<f64> {
    row.get("step").and_then(Value::as_f64)
}

fn points(rows: &[Row], key: &str) -> Vec<Point> {
    rows.iter().filter_map(|row| Some((step_of(row)?, row.get(key)?.as_f64()?))).collect()
}

fn band_of(rows: &[Row], key: &str, band: Band) -> Vec<(f64, f64, f64)> {
    let number = |row: &Row, key: &str| row.get(key).and_then(Value::as_f64);
    rows.iter()
        .filter_map(|row| {
            let (step, middle) = (step_of(row)?, number(row, key)?);
            Some(match band {
                Band::Spread(spread) => (step, middle - number(row, spread)?, middle + number(row, spread)?),
                Band::Between(low, high) => (step, number(row, low)?, number(row, high)?),
            })
        })
        .collect()
}

/// The mean of every reward function, by the keys `rewards/<name>/mean`.
fn reward_parts(rows: &[Row]) -> Vec<Series> {
    let mut names: Vec<&str> = rows
        .iter()
        .flat_map(|row| row.keys())
        .filter_map(|key| key.strip_prefix("rewards/")?.strip_suffix("/mean"))
        .collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .map(|name| Series { label: name.into(), points: points(rows, &format!("rewards/{name}/mean")) })
        .filter(|series| series.points.len() > 1)
        .collect()
}

type Plot<T> = Result<T, Box<dyn std::error::Error>>;

fn draw(title: &str, panels: &[Panel]) -> Plot<String> {
    let columns = match panels.len() {
        4 => 2,
        count => count.min(3),
    };
    let rows = panels.len().div_ceil(columns);
    let size = (columns as u32 * PANEL.0 + 2 * MARGIN, rows as u32 * PANEL.1 + HEADER + MARGIN);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        root.fill(&WHITE)?;
        let left = MARGIN as i32 + 12;
        root.draw(&Text::new(title.to_string(), (left, 18), ("sans-serif", 20).into_font().color(&INK)))?;
        let steps = panels.iter().flat_map(|p| &p.series).flat_map(|s| &s.points).map(|p| p.0).fold(0.0, f64::max);
        let mut note = format!("{steps} optimizer steps");
        if panels.iter().flat_map(|p| &p.series).any(|s| s.points.len() >= SMOOTHED_FROM) {
            note.push_str(" · thin: each logged row, thick: moving average");
        }
        root.draw(&Text::new(note, (left, 42), ("sans-serif", 13).into_font().color(&QUIET)))?;
        let grid = root.margin(HEADER, MARGIN, MARGIN, MARGIN).split_evenly((rows, columns));
        for (panel, area) in panels.iter().zip(&grid) {
            draw_panel(panel, area)?;
        }
        root.present()?;
    }
    Ok(text)
}

fn draw_panel(panel: &Panel, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Plot<()> {
    let all = || panel.series.iter().flat_map(|series| &series.points);
    let x = range(all().map(|p| p.0), 0.0);
    let y = range(all().map(|p| p.1).chain(panel.band.iter().flat_map(|&(_, low, high)| [low, high])), 0.06);
    area.draw(&Text::new(panel.title.clone(), (12, 6), ("sans-serif", 14).into_font().color(&INK)))?;
    let y_label = tick_format(y.end - y.start, y.start.abs().max(y.end.abs()));
    let mut chart = ChartBuilder::on(area)
        .margin_top(if panel.series.len() > 1 { 44 } else { 30 })
        .margin_right(14)
        .margin_bottom(4)
        .set_label_area_size(LabelAreaPosition::Left, 56)
        .set_label_area_size(LabelAreaPosition::Bottom, 26)
        .build_cartesian_2d(x, y)?;
    let labels = ("sans-serif", 12).into_font().color(&QUIET);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RULE)
        .axis_style(RULE)
        .x_labels(6)
        .y_labels(5)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| y_label.write(*value))
        .label_style(labels)
        .draw()?;
    if !panel.band.is_empty() {
        let mut outline: Vec<Point> = panel.band.iter().map(|&(step, low, _)| (step, low)).collect();
        outline.extend(panel.band.iter().rev().map(|&(step, _, high)| (step, high)));
        chart.draw_series(std::iter::once(Polygon::new(outline, PALETTE[0].mix(0.13))))?;
    }
    for (series, color) in panel.series.iter().zip(PALETTE.iter().cycle()) {
        let is_long = series.points.len() >= SMOOTHED_FROM;
        let thin = if is_long { color.mix(0.35).stroke_width(1) } else { color.stroke_width(2) };
        chart.draw_series(LineSeries::new(series.points.iter().copied(), thin))?;
        if is_long {
            chart.draw_series(LineSeries::new(moving_average(&series.points), color.stroke_width(2)))?;
        } else {
            chart.draw_series(series.points.iter().map(|&point| Circle::new(point, 2, color.filled())))?;
        }
    }
    if panel.series.len() > 1 { legend(panel, area) } else { Ok(()) }
}

/// Colour keys in one line under the title, at the right.
fn legend(panel: &Panel, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Plot<()> {
    const LETTER: i32 = 7;
    let widths: Vec<i32> = panel.series.iter().map(|s| 22 + s.label.chars().count() as i32 * LETTER).collect();
    let mut left = (area.dim_in_pixel().0 as i32 - 10 - widths.iter().sum::<i32>()).max(60);
    for ((series, color), width) in panel.series.iter().zip(PALETTE.iter().cycle()).zip(widths) {
        area.draw(&PathElement::new([(left, 31), (left + 12, 31)], color.stroke_width(3)))?;
        area.draw(&Text::new(series.label.clone(), (left + 16, 25), ("sans-serif", 11).into_font().color(&QUIET)))?;
        left += width;
    }
    Ok(())
}

/// From the smallest to the largest value, widened by a share of the span; never empty.
fn range(values: impl Iterator<Item = f64>, padding: f64) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    let span = high - low;
    if span <= f64::EPSILON * high.abs().max(low.abs()) {
        let around = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
        return low - around..high + around;
    }
    low - span * padding..high + span * padding
}

/// The mean of the points around each, over a twentieth of the series.
fn moving_average(points: &[Point]) -> Vec<Point> {
    let reach = (points.len() / 40).max(2);
    points
        .iter()
        .enumerate()
        .map(|(index, &(step, _))| {
            let window = &points[index.saturating_sub(reach)..(index + reach + 1).min(points.len())];
            (step, window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64)
        })
        .collect()
}

/// How the values of an axis are written: all alike.
#[derive(Clone, Copy)]
enum TickFormat {
    Decimals(usize),
    Exponent,
}

fn tick_format(span: f64, largest: f64) -> TickFormat {
    if !(1e-2..1e6).contains(&largest) {
        return TickFormat::Exponent;
    }
    TickFormat::Decimals((-(span / 8.0).log10().floor()).clamp(0.0, 6.0) as usize)
}

impl TickFormat {
    fn write(self, value: f64) -> String {
        match self {
            Self::Decimals(decimals) => {
                let text = format!("{value:.decimals$}");
                // A rounded negative zero.
                if text.trim_start_matches('-').chars().all(|c| "0.".contains(c)) {
                    text.replace('-', "")
                } else {
                    text
                }
            }
            Self::Exponent if value.abs() < 1e-15 => "0".into(),
            Self::Exponent => format!("{value:.1e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(steps: u32) -> Vec<Row> {
        let mut noise = crate::rng::Stream::new(1, "curves", 0, 0);
        (1..=steps)
            .map(|step| {
                let done = f64::from(step) / f64::from(steps);
                let reward = 0.3 + 0.6 * done + 0.08 * noise.normal();
                let length = 60.0 - 30.0 * done + 3.0 * noise.normal();
                json!({"step": step, "loss": 0.02 * noise.normal(), "reward": reward, "reward_std": 0.4 - 0.25 * done,
                    "rewards/accuracy/mean": reward - 0.1, "rewards/format/mean": (reward + 0.2).min(1.0),
                    "kl": 0.004 * done + 0.0004 * noise.normal().abs(), "entropy": 1.4 - done + 0.05 * noise.normal(),
                    "completions/mean_length": length, "completions/min_length": length * 0.5,
                    "completions/max_length": length * 1.6, "grad_norm": 0.5 + 0.1 * noise.normal(),
                    "learning_rate": 1e-5 * (1.0 - done)})
            })
            .map(|value| value.as_object().unwrap().clone())
            .collect()
    }

    #[test]
    fn a_grpo_run_draws_a_panel_for_every_logged_metric() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curves.svg");
        assert!(write_curves(&path, "GRPO", &run(120)).unwrap());
        let text = std::fs::read_to_string(&path).unwrap();
        for title in [
            "Reward (mean",
            "Reward by function",
            "Loss",
            "KL to",
            "Entropy",
            "Completion length",
            "Gradient",
            "Learning",
        ] {
            assert_eq!(text.matches(title).count(), 1, "{title}");
        }
        assert!(!text.contains("Token accuracy"));
        assert!(text.trim_end().ends_with("</svg>"));
        if let Some(kept) = std::env::var_os("TRAINER_KEEP_CURVES") {
            std::fs::copy(&path, kept).unwrap();
        }
    }

    #[test]
    fn nothing_to_draw_leaves_no_file_and_gaps_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curves.svg");
        assert!(!write_curves(&path, "SFT", &run(1)).unwrap());
        assert!(!path.exists());
        let rows: Vec<Row> =
            [json!({"step": 1, "loss": 1.0}), json!({"step": 2, "loss": null}), json!({"step": 3, "loss": 1.0})]
                .iter()
                .map(|row| row.as_object().unwrap().clone())
                .collect();
        assert_eq!(points(&rows, "loss"), [(1.0, 1.0), (3.0, 1.0)]);
        assert!(write_curves(&path, "SFT", &rows).unwrap());
        assert!(!std::fs::read_to_string(&path).unwrap().contains("NaN"));
    }

    #[test]
    fn axis_values_are_short_and_alike() {
        let write = |span, largest, value| tick_format(span, largest).write(value);
        assert_eq!(write(1.0, 1.0, 0.25), "0.2");
        assert_eq!(write(0.4, 1.0, 0.25), "0.25");
        assert_eq!(write(100.0, 120.0, 20.0), "20");
        assert_eq!(write(1e-5, 1e-5, 5e-6), "5.0e-6");
        assert_eq!(write(1e-5, 1e-5, 0.0), "0");
        assert_eq!(write(0.4, 0.5, -0.000_001), "0.00");
        assert_eq!(range([2.0, 2.0].into_iter(), 0.1), 1.8..2.2);
        assert_eq!(range([0.0].into_iter(), 0.1), -1.0..1.0);
    }
}
