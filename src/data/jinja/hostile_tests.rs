//! Templates that would hang, fill memory or overflow the stack: each ends in one message, soon.

use std::time::Instant;

use serde_json::{Map, json};

use super::Template;

/// Longest that one of them may take here, also on a slow machine in a debug build.
const MOST_SECS: f64 = 10.0;

fn repeated(begin: &str, middle: &str, end: &str, count: usize) -> String {
    [begin.repeat(count), middle.to_string(), end.repeat(count)].concat()
}

fn outcome(source: &str) -> Result<String, String> {
    let context: Map<_, _> = json!({"messages": [{"role": "user", "content": "x"}]}).as_object().unwrap().clone();
    let started = Instant::now();
    let rendered = Template::parse(source).and_then(|template| template.render(&context, None, &|_| String::new()));
    let seconds = started.elapsed().as_secs_f64();
    assert!(seconds < MOST_SECS, "{seconds} s for {}", &source[..source.len().min(100)]);
    rendered.map_err(|error| error.to_string())
}

fn refused(sources: &[String]) {
    for source in sources {
        let found = outcome(source);
        let shown: String = source.chars().take(100).collect();
        assert!(found.is_err(), "{shown} gave {} bytes", found.unwrap().len());
        assert!(found.unwrap_err().len() < 400, "{shown}");
    }
}

#[test]
fn texts_lists_and_numbers_of_absurd_size_are_refused_before_they_are_made() {
    let expressions = [
        "'a' * 10**9",
        "[1] * 10**9",
        "10**10**9",
        "'%1000000000d' % 5",
        "'%.1000000000f' % 1.0",
        "'%*d' % (10**12, 1)",
        "'{:1000000000}'.format(5)",
        "'{:{w}}'.format(1, w=10**12)",
        "'a'.center(10**9)",
        "'a'.ljust(10**10)",
        "'a'.zfill(10**9)",
        "'\\t'.expandtabs(10**9)",
        "'a'|center(10**9)",
        "'a'|indent(10**9)",
        "('a\\n' * 100000)|indent(100000)",
        "[1]|tojson(indent=10**9)",
        "[1]|batch(10**9, 0)|list",
        "[1]|slice(10**9)|list",
        "range(10**9)",
        "range(99999)|map('string')|join('x' * 100000)",
        "('x' * 10000000)|replace('', 'y' * 1000)",
        "('9' * 100000)|int",
        "strftime_now('%1000000000d')",
    ];
    refused(&expressions.map(|expression| format!("{{{{ {expression} }}}}")));
    let growing = |start: &str, step: &str, shown: &str| {
        format!(
            "{{% set n = namespace(x={start}, y={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{{{{ {shown} }}}}"
        )
    };
    refused(&[
        growing("'a'", "{% set n.x = n.x + n.x %}", "n.x"),
        growing("['a']", "{% set n.x = n.x + n.x %}", "n.x"),
        growing("['a']", "{% set n.x = [n.x, n.x] %}", "n.x"),
        growing("['a']", "{% set n.x = [n.x, n.x] %}", "n.x|tojson"),
        growing("['a']", "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}", "n.x == n.y"),
    ]);
}

#[test]
fn loops_that_take_too_long_are_ended() {
    let body = [
        "{% for j in range(99999) %}{% endfor %}",
        "{% for j in range(99999) %}{{ i }}{% endfor %}",
        "{{ x.count('b') }}",
        "{{ x == x ~ '' }}",
        "{{ 'b' in x }}",
        "{% if x|float %}{% endif %}",
        "{% if x|length %}{% endif %}",
        "{% if x is upper %}{% endif %}",
        "{{ list|sort|length }}",
    ];
    let head = "{% set x = 'é' * 500000 %}{% set list = range(99999)|list %}";
    refused(&body.map(|body| format!("{head}{{% for i in range(99999) %}}{body}{{% endfor %}}")));
    refused(&["{% set list = range(99999)|list %}{{ list|unique|list|length }}".into()]);
}

#[test]
fn nesting_and_recursion_without_end_are_refused() {
    let expressions = [
        repeated("(", "1", ")", 10_000),
        repeated("[", "", "]", 10_000),
        repeated("{1:", "1", "}", 10_000),
        repeated("x(", "", ")", 10_000),
        repeated("not ", "1", "", 10_000),
        repeated("-", "1", "", 10_000),
        repeated("1+", "1", "", 100_000),
        repeated("", "x", ".a", 100_000),
        repeated("", "x", "|e", 100_000),
        repeated("1 if 0 else ", "1", "", 10_000),
        repeated("a[", "", "", 10_000),
    ];
    refused(&expressions.map(|expression| format!("{{{{ {expression} }}}}")));
    refused(&[
        repeated("{% if 1 %}", "", "{% endif %}", 10_000),
        repeated("{% for i in [1] %}", "", "{% endfor %}", 10_000),
        repeated("{% set a %}", "", "{% endset %}", 10_000),
        repeated("{% set (", "", "", 10_000),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}".into(),
        // Namespaces that hold one another, from the top down.
        "{% set n = namespace() %}{% set n.first = namespace() %}{% set n.last = n.first %}{% for i in range(9999) %}\
         {% set c = n.last %}{% set c.x = namespace() %}{% set n.last = c.x %}{% endfor %}{{ n.first }}"
            .into(),
    ]);
}

#[test]
fn a_long_conversation_stays_within_the_budget() {
    let turns: Vec<_> =
        (0..500).map(|i| json!({"role": "user", "content": "word ".repeat(100) + &i.to_string()})).collect();
    let context: Map<_, _> = json!({ "messages": turns }).as_object().unwrap().clone();
    let source = "{% set n = namespace(out='') %}{% for m in messages %}{% set n.out = n.out + m.role + m.content|trim %}{% endfor %}{{ n.out }}";
    let text = Template::parse(source).unwrap().render(&context, None, &|_| String::new());
    let error = text.map(|text| text.len()).map_err(|error| error.to_string());
    assert!(error.is_ok_and(|length| length > 250_000));
}
