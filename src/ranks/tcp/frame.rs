//! What goes over a connection: a header of fixed length and bytes.

use std::io::{self, Read, Write};

const MAGIC: [u8; 4] = *b"TRN1";
const HEADER: usize = 32;
/// More than a collective carries: a damaged length is seen at once.
const MOST_BYTES: u64 = 1 << 40;
/// Bytes that are read before the reader shows that something came.
const CHUNK: usize = 1 << 20;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// A rank's share of a collective.
    Data = 0,
    /// A sign of life.
    Beat = 1,
    /// The sender has left the work at hand.
    StartOver = 2,
    /// The sender ends with an error, whose text follows.
    Failure = 3,
    /// The sender asks the first rank for a number, and gets it.
    Turn = 4,
}

/// Which collective it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Operation {
    Broadcast = 0,
    AllGather = 1,
    AllToAll = 2,
    Barrier = 3,
    StartOver = 4,
    /// What goes on beside these frames.
    Exchange = 5,
    /// No collective.
    NextTurn = 6,
}

impl Operation {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Broadcast => "broadcast",
            Self::AllGather => "all_gather_bytes",
            Self::AllToAll => "all_to_all_bytes",
            Self::Barrier => "barrier",
            Self::StartOver => "start_over",
            Self::Exchange => "the exchange between GPUs",
            Self::NextTurn => "next_turn",
        }
    }
}

/// One message.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) operation: Operation,
    /// How often the sender has left work at hand.
    pub(super) generation: u32,
    pub(super) round: u64,
    pub(super) bytes: Vec<u8>,
}

impl Frame {
    pub(super) fn header(kind: Kind, operation: Operation, generation: u32, round: u64) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&MAGIC);
        header[4] = kind as u8;
        header[5] = operation as u8;
        header[8..12].copy_from_slice(&generation.to_le_bytes());
        header[16..24].copy_from_slice(&round.to_le_bytes());
        header
    }

    /// Reads the next frame; `heard` is called whenever something has come.
    pub(super) fn read(from: &mut impl Read, heard: &dyn Fn()) -> io::Result<Self> {
        let mut header = [0; HEADER];
        from.read_exact(&mut header)?;
        heard();
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| header[at + byte]));
        let (round, length) = (number(16), number(24));
        let generation = number(8) as u32;
        let kind = match header[4] {
            0 => Kind::Data,
            1 => Kind::Beat,
            2 => Kind::StartOver,
            3 => Kind::Failure,
            4 => Kind::Turn,
            _ => return Err(damaged()),
        };
        let operation = match header[5] {
            0 => Operation::Broadcast,
            1 => Operation::AllGather,
            2 => Operation::AllToAll,
            3 => Operation::Barrier,
            4 => Operation::StartOver,
            6 => Operation::NextTurn,
            _ => return Err(damaged()),
        };
        if header[..4] != MAGIC || length > MOST_BYTES {
            return Err(damaged());
        }
        let mut bytes = Vec::new();
        let mut left = length as usize;
        while left > 0 {
            // Memory is asked for as the bytes come, so that a damaged length does not take it.
            let start = bytes.len();
            bytes.resize(start + left.min(CHUNK), 0);
            from.read_exact(&mut bytes[start..])?;
            heard();
            left -= bytes.len() - start;
        }
        Ok(Self { kind, operation, generation, round, bytes })
    }
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a frame of this program's version")
}

/// Writes a header, which takes the length, and the bytes. While the other side takes nothing, `goes_on` is asked whether to try
/// further.
pub(super) fn write(
    to: &mut impl Write,
    mut header: [u8; HEADER],
    bytes: &[u8],
    goes_on: &dyn Fn() -> bool,
) -> io::Result<()> {
    header[24..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    write_all(to, &header, goes_on)?;
    write_all(to, bytes, goes_on)
}

fn write_all(to: &mut impl Write, mut rest: &[u8], goes_on: &dyn Fn() -> bool) -> io::Result<()> {
    while !rest.is_empty() {
        match to.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) && goes_on() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes a sign of life, unless the other side takes nothing now.
pub(super) fn write_if_taken(to: &mut impl Write, generation: u32, goes_on: &dyn Fn() -> bool) -> io::Result<()> {
    let mut header = Frame::header(Kind::Beat, Operation::Barrier, generation, 0);
    header[24..].fill(0);
    match to.write(&header)? {
        HEADER => Ok(()),
        // What was begun is finished.
        count => write_all(to, &header[count..], goes_on),
    }
}
