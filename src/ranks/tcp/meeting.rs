//! How ranks find each other: all go to rank 0, which tells everybody where everybody listens.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Tcp;
use crate::ranks::Error;

/// Time between two tries to reach a rank that does not listen yet.
const PAUSE: Duration = Duration::from_millis(50);
/// Longest message of a meeting.
const MOST_BYTES: u32 = 1 << 24;
/// What a connection of this program begins with.
const GREETING: [u8; 8] = *b"trainer\x01";

/// Who meets where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meeting {
    /// This rank.
    pub rank: usize,
    /// How many there are.
    pub world_size: usize,
    /// Host and port of rank 0.
    pub address: (String, u16),
    /// The name of this rank's host.
    pub host: String,
    /// Longest time that a rank waits for another, here and in every collective.
    pub deadline: Duration,
}

/// What a rank says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Hello {
    version: String,
    rank: usize,
    world_size: usize,
    host: String,
    /// Where it listens for the ranks after it.
    port: u16,
}

/// What rank 0 answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Answer {
    Welcome(Vec<Listed>),
    Refused(String),
}

/// Where a rank listens.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Listed {
    host: String,
    address: String,
    port: u16,
}

/// A port of this machine that nobody has now.
///
/// # Errors
/// If there is none.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Meets the other ranks.
///
/// # Errors
/// If they do not all come within the deadline, two are the same one, or they are of different programs.
pub fn connect(meeting: &Meeting) -> Result<Tcp, Error> {
    let until = Instant::now() + meeting.deadline;
    let streams = if meeting.rank == 0 { receive(meeting, until)? } else { go(meeting, until)? };
    Tcp::new(meeting.rank, streams, meeting.deadline).map_err(|error| meeting.failed(&error))
}

impl Meeting {
    fn place(&self) -> String {
        format!("{}:{}", self.address.0, self.address.1)
    }

    fn failed(&self, problem: &dyn std::fmt::Display) -> Error {
        Error::Meeting { rank: self.rank, place: self.place(), problem: problem.to_string() }
    }

    fn hello(&self, port: u16) -> Hello {
        Hello { version: version(), rank: self.rank, world_size: self.world_size, host: self.host.clone(), port }
    }
}

/// The program and the form of its frames.
fn version() -> String {
    format!("{} {}", env!("CARGO_PKG_VERSION"), option_env!("TRAINER_GIT_COMMIT").unwrap_or_default())
}

type Streams = Vec<Option<(TcpStream, String)>>;

/// Rank 0's side.
fn receive(meeting: &Meeting, until: Instant) -> Result<Streams, Error> {
    let listener = listen(meeting.address.1).map_err(|error| {
        let hint = "another job may have it; set MASTER_PORT to a free one";
        meeting.failed(&format!("cannot listen there: {error} ({hint})"))
    })?;
    let mut came: Vec<Option<(TcpStream, Hello)>> = (0..meeting.world_size).map(|_| None).collect();
    while came.iter().skip(1).any(Option::is_none) {
        let missing = || {
            let ranks: Vec<usize> = (1..came.len()).filter(|&rank| came[rank].is_none()).collect();
            Error::NotMet { place: meeting.place(), secs: meeting.deadline.as_secs(), missing: ranks }
        };
        let Some((mut stream, hello)) = accept::<Hello>(&listener, until).map_err(|error| meeting.failed(&error))?
        else {
            return Err(missing());
        };
        let refusal = if hello.version != version() {
            Some(format!("rank {} is of trainer {}, rank 0 of {}", hello.rank, hello.version, version()))
        } else if hello.world_size != meeting.world_size || hello.rank == 0 || hello.rank >= meeting.world_size {
            let Hello { rank, world_size, host, .. } = &hello;
            Some(format!("rank {rank} of {world_size} on {host} came to rank 0 of {}", meeting.world_size))
        } else if let Some((_, other)) = &came[hello.rank] {
            Some(format!("rank {} was started twice, on {} and on {}", hello.rank, other.host, hello.host))
        } else {
            None
        };
        if let Some(reason) = refusal {
            // Everybody is told; who is gone already needs no answer.
            let refused = Answer::Refused(reason.clone());
            let all = came.iter_mut().flatten().map(|(stream, _)| stream).chain([&mut stream]);
            all.for_each(|stream| drop(send(stream, &refused)));
            return Err(meeting.failed(&format!("{reason}; start each rank once, all with one program")));
        }
        let rank = hello.rank;
        came[rank] = Some((stream, hello));
    }
    let listed = |entry: &Option<(TcpStream, Hello)>| {
        let Some((stream, hello)) = entry else {
            return Ok(Listed { host: meeting.host.clone(), ..Listed::default() });
        };
        let address = stream.peer_addr()?.ip().to_string();
        Ok(Listed { host: hello.host.clone(), address, port: hello.port })
    };
    let list: Vec<Listed> =
        came.iter().map(listed).collect::<io::Result<_>>().map_err(|error| meeting.failed(&error))?;
    let welcome = Answer::Welcome(list);
    let mut streams = Streams::with_capacity(came.len());
    for entry in came {
        let Some((mut stream, hello)) = entry else {
            streams.push(None);
            continue;
        };
        send(&mut stream, &welcome).map_err(|error| meeting.failed(&error))?;
        streams.push(Some((stream, hello.host)));
    }
    Ok(streams)
}

/// The side of every other rank.
fn go(meeting: &Meeting, until: Instant) -> Result<Streams, Error> {
    let failed = |error: io::Error| meeting.failed(&error);
    let listener = listen(0).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let mut first = reach(&meeting.address.0, meeting.address.1, until).map_err(|error| {
        meeting.failed(&format!("rank 0 was not reached within {} s ({error})", meeting.deadline.as_secs()))
    })?;
    send(&mut first, &meeting.hello(port)).map_err(failed)?;
    let list = match receive_message(&mut first, until).map_err(|error| {
        meeting.failed(&format!("rank 0 did not answer ({error}); it may wait for other ranks: see its log"))
    })? {
        Answer::Welcome(list) if list.len() == meeting.world_size => list,
        Answer::Welcome(list) => return Err(meeting.failed(&format!("rank 0 lists {} ranks", list.len()))),
        Answer::Refused(reason) => return Err(meeting.failed(&reason)),
    };
    let mut streams: Streams = (0..meeting.world_size).map(|_| None).collect();
    streams[0] = Some((first, list[0].host.clone()));
    for (rank, listed) in list.iter().enumerate().take(meeting.rank).skip(1) {
        // Who reached rank 0 by the machine itself is on the machine of rank 0.
        let is_beside_first = listed.address.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let address = if is_beside_first { &meeting.address.0 } else { &listed.address };
        let mut stream = reach(address, listed.port, until)
            .map_err(|error| meeting.failed(&format!("rank {rank} on {} was not reached ({error})", listed.host)))?;
        send(&mut stream, &meeting.hello(port)).map_err(failed)?;
        streams[rank] = Some((stream, listed.host.clone()));
    }
    while streams.iter().skip(meeting.rank + 1).any(Option::is_none) {
        let Some((stream, hello)) = accept::<Hello>(&listener, until).map_err(failed)? else {
            let missing = (meeting.rank + 1..streams.len()).filter(|&rank| streams[rank].is_none()).collect();
            return Err(Error::NotMet { place: meeting.place(), secs: meeting.deadline.as_secs(), missing });
        };
        if hello.rank > meeting.rank && hello.rank < meeting.world_size {
            streams[hello.rank] = Some((stream, hello.host));
        }
    }
    Ok(streams)
}

/// Listens on all addresses of the machine.
fn listen(port: u16) -> io::Result<TcpListener> {
    let any = [SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))];
    let listener = TcpListener::bind(&any[..])?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The next connection that begins as one of this program's, with what it says; `None` at the deadline. Others are let go.
fn accept<T: DeserializeOwned>(listener: &TcpListener, until: Instant) -> io::Result<Option<(TcpStream, T)>> {
    /// Who connects says at once who it is.
    const PATIENCE: Duration = Duration::from_secs(10);
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => {
                stream.set_nonblocking(false)?;
                if let Ok(message) = receive_message(&mut stream, until.min(Instant::now() + PATIENCE)) {
                    return Ok(Some((stream, message)));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= until {
                    return Ok(None);
                }
                std::thread::sleep(PAUSE / 5);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Connects, trying again until the deadline while nobody listens there.
fn reach(host: &str, port: u16, until: Instant) -> io::Result<TcpStream> {
    loop {
        let tried = (host, port).to_socket_addrs().and_then(|addresses| {
            let mut last = io::Error::new(io::ErrorKind::NotFound, format!("`{host}` has no address"));
            for address in addresses {
                let left = until.saturating_duration_since(Instant::now()).max(PAUSE);
                match TcpStream::connect_timeout(&address, left.min(Duration::from_secs(5))) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        });
        match tried {
            Err(_) if Instant::now() < until => std::thread::sleep(PAUSE),
            tried => return tried,
        }
    }
}

fn send(stream: &mut TcpStream, message: &impl Serialize) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let length = (bytes.len() as u32).to_le_bytes();
    stream.write_all(&[&GREETING[..], &length, &bytes].concat())
}

fn receive_message<T: DeserializeOwned>(stream: &mut TcpStream, until: Instant) -> io::Result<T> {
    let left = || Some(until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    let mut start = [0; GREETING.len() + 4];
    stream.set_read_timeout(left())?;
    stream.read_exact(&mut start)?;
    let (greeting, length) = start.split_at(GREETING.len());
    let length = u32::from_le_bytes(std::array::from_fn(|byte| length[byte]));
    if greeting != GREETING || length > MOST_BYTES {
        return Err(wrong("no rank of this program"));
    }
    let mut bytes = vec![0; length as usize];
    stream.set_read_timeout(left())?;
    stream.read_exact(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(|error| wrong(&error.to_string()))
}
