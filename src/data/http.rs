//! Requests to a hub that is not trusted.
//!
//! The token goes to the hub's own address only; redirects are followed one by one, a few of them, and never from
//! encrypted to plain. Whatever the hub answers is bounded by what it announced.

use std::fmt::Write;
use std::io::Read;
use std::time::Duration;

use ureq::Agent;
use ureq::http::HeaderMap;

/// Redirects that are followed.
const MOST_REDIRECTS: usize = 8;
/// How long to wait for a connection, and for the next bytes of an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// An address, and what goes with requests to it.
#[derive(Clone, Debug)]
pub(super) struct Client<'a> {
    pub(super) endpoint: &'a str,
    pub(super) token: Option<&'a str>,
}

/// An answer with status 200 or 206.
pub(super) struct Answer {
    /// Status of the last hop.
    pub(super) status: u16,
    /// Headers of the hops on the hub's own address, earlier ones first.
    own: Vec<HeaderMap>,
    /// Headers of the last hop.
    last: HeaderMap,
    pub(super) body: Box<dyn Read>,
}

impl Answer {
    /// A header as the hub itself says it; the hop that has it first counts.
    pub(super) fn own_header(&self, name: &str) -> Option<&str> {
        self.own.iter().find_map(|headers| headers.get(name)?.to_str().ok())
    }

    /// A header of the last hop.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.last.get(name)?.to_str().ok()
    }
}

impl Client<'_> {
    /// Asks for `path` of the hub, from byte `start` on; `limit` bounds the time of all of it.
    ///
    /// # Errors
    /// What went wrong: no connection, another status, a redirect that is not followed.
    pub(super) fn get(&self, path: &str, mut start: Option<u64>, limit: Option<Duration>) -> Result<Answer, String> {
        let agent: Agent = Agent::config_builder()
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .timeout_global(limit)
            .user_agent(concat!("trainer/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .build()
            .into();
        let home = origin(self.endpoint).ok_or_else(|| format!("`{}` is no address", self.endpoint))?;
        let mut url = format!("{}{path}", self.endpoint);
        let mut own = Vec::new();
        for _ in 0..=MOST_REDIRECTS {
            let is_home = origin(&url).as_ref() == Some(&home);
            let mut request = agent.get(&url);
            if let Some(token) = self.token.filter(|_| is_home) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if let Some(start) = start {
                request = request.header("range", format!("bytes={start}-"));
            }
            let response = request.call().map_err(|e| format!("{} answers: {e}", self.endpoint))?;
            let status = response.status();
            let (parts, body) = response.into_parts();
            if is_home {
                own.push(parts.headers.clone());
            }
            if status.is_redirection() {
                let location = parts.headers.get("location").and_then(|value| value.to_str().ok());
                url = follow(&url, location.unwrap_or_default())
                    .ok_or_else(|| format!("{} answers with a redirect that is not followed", self.endpoint))?;
                continue;
            }
            if status.as_u16() == 416 && start == Some(0) {
                // Of an empty file there is no range.
                start = None;
                continue;
            }
            if !matches!(status.as_u16(), 200 | 206) {
                return Err(format!("{} answers: {status}", self.endpoint));
            }
            let body = Box::new(body.into_reader());
            return Ok(Answer { status: status.as_u16(), own, last: parts.headers, body });
        }
        Err(format!("{} answers with more than {MOST_REDIRECTS} redirects", self.endpoint))
    }
}

/// Scheme, host and port of an address, and nothing else of it.
fn origin(url: &str) -> Option<(String, String)> {
    let (scheme, rest) = url.split_once("://")?;
    let scheme = scheme.to_ascii_lowercase();
    let authority = rest.split(['/', '?', '#', '\\']).next()?.to_ascii_lowercase();
    let default = match scheme.as_str() {
        "https" => ":443",
        "http" => ":80",
        _ => return None,
    };
    let authority = authority.strip_suffix(default).unwrap_or(&authority).to_string();
    (!authority.is_empty()).then_some((scheme, authority))
}

/// Where a redirect leads, if it may be followed.
fn follow(from: &str, location: &str) -> Option<String> {
    let (scheme, authority) = origin(from)?;
    if location.chars().any(|c| c.is_control() || c == '\\' || c == ' ') {
        return None;
    }
    let to = match location {
        _ if location.contains("://") && !location.starts_with('/') => location.to_string(),
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.starts_with('/') => format!("{scheme}://{authority}{location}"),
        _ => return None,
    };
    let (new_scheme, new_authority) = origin(&to)?;
    let is_weaker = scheme == "https" && new_scheme != "https";
    (!is_weaker && !new_authority.contains('@')).then_some(to)
}

/// A path in the form that addresses have.
pub(super) fn encoded(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_followed_to_places_that_can_be_trusted_with_the_request() {
        let from = "https://hub.example/api/x";
        for (location, expected) in [
            ("/y?z=1", Some("https://hub.example/y?z=1")),
            ("//cdn.example/y", Some("https://cdn.example/y")),
            ("https://cdn.example:444/y", Some("https://cdn.example:444/y")),
            ("http://hub.example/y", None),
            ("file:///etc/passwd", None),
            ("https://hub.example@evil.example/", None),
            ("https://hub.example\\@evil.example/", None),
            ("y", None),
            ("", None),
        ] {
            assert_eq!(follow(from, location).as_deref(), expected, "{location}");
        }
        assert_eq!(follow("http://a:1/x", "http://b:2/y").as_deref(), Some("http://b:2/y"));
    }

    #[test]
    fn the_home_of_an_address_is_its_scheme_host_and_port() {
        assert_eq!(origin("https://Hub.example:443/x"), origin("https://hub.example/y?z"));
        for other in [
            "http://hub.example",
            "https://hub.example:8443",
            "https://hub.example.evil",
            "https://x@hub.example",
            "https://evil/hub.example",
        ] {
            assert_ne!(origin(other), origin("https://hub.example"), "{other}");
        }
        assert_eq!(encoded("a b/c#d%é.json"), "a%20b/c%23d%25%C3%A9.json");
    }
}
