//! Numbers with units, as people read them.
//!
//! Every number of the console passes through here, so that the same quantity looks the same everywhere.

/// Bytes in binary units with three significant digits, e.g. `1.50 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // 999.5 and more would print four digits.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", significant(value), UNITS[unit])
}

/// A count with thousands separated by commas, e.g. `12,345`.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A large count in short: `950`, `12.3k`, `4.56M`, `7.62G`.
pub fn short_count(value: f64) -> String {
    let size = value.abs();
    if size < 999.5 {
        return if value.fract() == 0.0 { format!("{value:.0}") } else { significant(value) };
    }
    for (bound, divisor, suffix) in [(999_500.0, 1e3, "k"), (999_500_000.0, 1e6, "M"), (999_500_000_000.0, 1e9, "G")] {
        if size < bound {
            return format!("{}{suffix}", significant(value / divisor));
        }
    }
    format!("{}T", significant(value / 1e12))
}

/// A span of time: `0.82 s`, `42.1 s`, `3 min 05 s`, `2 h 07 min`.
pub fn duration(secs: f64) -> String {
    if !secs.is_finite() || secs < 0.0 {
        return "unknown".into();
    }
    if secs < 9.995 {
        return format!("{secs:.2} s");
    }
    if secs < 59.95 {
        return format!("{secs:.1} s");
    }
    let whole = secs.round() as u64;
    if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
    }
}

/// A share as a percentage: `12.5 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Three significant digits for a value under 1000.
fn significant(value: f64) -> String {
    match value.abs() {
        size if size < 9.995 => format!("{value:.2}"),
        size if size < 99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_quantity_keeps_three_digits_and_its_unit_across_the_borders() {
        let cases = [
            (bytes(0), "0 B"),
            (bytes(1023), "1023 B"),
            (bytes(1024), "1.00 KiB"),
            (bytes(1536 << 20), "1.50 GiB"),
            (bytes((1 << 20) - 1), "1.00 MiB"),
            (bytes(u64::MAX), "16384 PiB"),
            (count(0), "0"),
            (count(999), "999"),
            (count(1000), "1,000"),
            (count(12_345_678), "12,345,678"),
            (short_count(12.0), "12"),
            (short_count(12.345), "12.3"),
            (short_count(999.6), "1.00k"),
            (short_count(12_345.0), "12.3k"),
            (short_count(7_615_616_512.0), "7.62G"),
            (short_count(2.5e13), "25.0T"),
            (duration(0.5), "0.50 s"),
            (duration(42.13), "42.1 s"),
            (duration(59.99), "1 min 00 s"),
            (duration(185.0), "3 min 05 s"),
            (duration(7620.0), "2 h 07 min"),
            (duration(f64::NAN), "unknown"),
            (percent(0.125), "12.5 %"),
        ];
        for (got, expected) in cases {
            assert_eq!(got, expected);
        }
    }
}
