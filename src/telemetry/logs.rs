//! Log events (`tracing`): warnings and, on request, more, on standard error, above any progress bars.
//!
//! The level is set by `TRAINER_LOG` (`warn` by default) in the syntax of `tracing_subscriber::EnvFilter`.

use std::fmt;
use std::io::{self, Write};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use super::{Error, Terminal};

/// Starts writing log events; call once, in `main`.
///
/// # Errors
/// If `TRAINER_LOG` cannot be read.
pub fn init_logs(terminal: &Terminal) -> Result<(), Error> {
    let value = std::env::var("TRAINER_LOG").unwrap_or_else(|_| "warn".into());
    let filter = EnvFilter::builder()
        .parse(&value)
        .map_err(|reason| Error::Filter { value: value.clone(), reason: reason.to_string() })?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .event_format(Line)
        .with_writer(AboveBars(terminal.clone()))
        .finish();
    // Fails only where a subscriber is set already, as under a test that calls `main` twice; that one stays.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}

/// `warning: message key=value`, the form of the error that ends a run.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        write!(writer, "{level}: ")?;
        if *event.metadata().level() > Level::INFO {
            write!(writer, "{}: ", event.metadata().target())?;
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Standard error, written while the bars are off the screen.
struct AboveBars(Terminal);

impl<'a> MakeWriter<'a> for AboveBars {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        LineWriter(&self.0)
    }
}

struct LineWriter<'a>(&'a Terminal);

impl Write for LineWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.above_bars(|| io::stderr().lock().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}
