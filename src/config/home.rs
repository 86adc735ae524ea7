//! `~` at the start of a path, as Python's `os.path.expanduser` reads it.

use std::path::Path;

/// The text with a leading `~` or `~name` replaced by that user's home folder; as it is where there is none.
///
/// `~` is `HOME` or, without it, what the system's list of users says of this user; `~name` is what the list says.
#[must_use]
pub fn expand(text: &str) -> String {
    let home = std::env::var("HOME").ok().filter(|home| !home.is_empty());
    let users = || std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    expand_with(text, home.as_deref(), users).unwrap_or_else(|| text.to_owned())
}

fn expand_with(text: &str, home: Option<&str>, users: impl Fn() -> String) -> Option<String> {
    let rest = text.strip_prefix('~')?;
    let (name, tail) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let folder = match (name, home) {
        ("", Some(home)) => home.to_owned(),
        ("", None) => home_in(&users(), |user| user.id == own_id())?,
        (name, _) => home_in(&users(), |user| user.name == name)?,
    };
    let folder = folder.trim_end_matches('/');
    Some(if folder.is_empty() && tail.is_empty() { "/".into() } else { format!("{folder}{tail}") })
}

/// One line of the list of users.
struct User<'a> {
    name: &'a str,
    id: Option<u32>,
}

fn home_in(users: &str, is_meant: impl Fn(&User<'_>) -> bool) -> Option<String> {
    users.lines().find_map(|line| {
        // name:password:uid:gid:comment:home:shell
        let fields: Vec<&str> = line.split(':').collect();
        let user = User { name: fields.first()?, id: fields.get(2)?.parse().ok() };
        is_meant(&user).then(|| fields.get(5).filter(|home| !home.is_empty()).map(|home| (*home).to_owned()))?
    })
}

/// The user this process runs as.
fn own_id() -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    Some(Path::new("/proc/self").metadata().ok()?.uid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leading_tilde_is_a_home_folder() {
        let users =
            || "root:x:0:0::/root:/bin/sh\nada:x:1000:1000:A. L.:/home/ada:/bin/sh\nnobody:x:2::::\n".to_owned();
        for (text, expected) in [
            ("~", Some("/h")),
            ("~/", Some("/h/")),
            ("~/runs/x", Some("/h/runs/x")),
            ("~ada/x", Some("/home/ada/x")),
            ("~ada", Some("/home/ada")),
            ("~bob/x", None),
            ("~nobody/x", None),
            ("a/~", None),
            ("a~b", None),
            ("/x", None),
            ("", None),
        ] {
            assert_eq!(expand_with(text, Some("/h/"), users).as_deref(), expected, "{text}");
        }
        assert_eq!(expand_with("~", Some("/"), users).as_deref(), Some("/"));
        assert_eq!(expand_with("~/x", Some("/"), users).as_deref(), Some("/x"));
        let own = || format!("me:x:{}:0::/own:/bin/sh\n", own_id().expect("Linux"));
        assert_eq!(expand_with("~/x", None, own).as_deref(), Some("/own/x"));
    }
}
