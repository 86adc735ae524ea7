//! Where the sequences of decoding steps stand, in the device's memory, so that steps follow each other without the host.

use std::sync::Arc;

use candle_core::DType;

use super::lane_pieces::{LanePieces, MOST_SHARING, most_pieces};
use super::paged_step::PagedSize;
use crate::device::{Buffer, Error, Pointer, Queue, Ticket, argument};

/// A sequence at the beginning of a few steps.
#[derive(Clone, Copy, Debug)]
pub struct Lane<'a> {
    /// Its newest token, which is not in the cache yet.
    pub token: u32,
    /// Its tokens before that.
    pub context: usize,
    /// Its pages, with room for the tokens of all steps.
    pub pages: &'a [u32],
    /// Distinct tokens of it so far, the newest among them, where a repetition penalty looks at them.
    pub seen: &'a [u32],
}

/// How many there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LanesSize {
    /// Sequences.
    pub lanes: usize,
    /// Steps between two visits of the host.
    pub steps: usize,
    /// Pages of all sequences together, shared ones counted for each.
    pub pages: usize,
    /// When attention reads pages that sequences share for several at once.
    pub sharing: PageSharing,
}

/// When parts of contexts whose pages several sequences have are read for several at once. That reads less, but makes some blocks
/// of attention longer, which are to wait for where all have a place at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSharing {
    /// For up to so many sequences at once, 1 to 64.
    pub lanes: usize,
    /// From so many parts of all sequences on.
    pub from: usize,
}

impl PageSharing {
    /// Each sequence by itself.
    pub const NONE: Self = Self { lanes: 1, from: 0 };
}

/// The tokens that were drawn in some steps, by step and lane.
#[derive(Clone, Debug, Default)]
pub struct Drawn {
    /// `[steps, lanes]`
    pub tokens: Vec<u32>,
    /// Log-probabilities under the plain distribution, NaN where the logits are unusable: `[steps, lanes]`.
    pub logprobs: Vec<f32>,
    /// And under the one that was drawn from: `[steps, lanes]`.
    pub sampling_logprobs: Vec<f32>,
}

impl Drawn {
    /// Room for so many.
    pub fn empty(count: usize) -> Self {
        Self { tokens: vec![0; count], logprobs: vec![0.0; count], sampling_logprobs: vec![0.0; count] }
    }

    /// Puts what was drawn for `lanes` lanes from `first` on into its place among that of `all`.
    pub fn put(&mut self, part: &Self, (first, lanes): (usize, usize), all: usize) {
        for from in 0..part.tokens.len() {
            let to = from / lanes * all + first + from % lanes;
            self.tokens[to] = part.tokens[from];
            self.logprobs[to] = part.logprobs[from];
            self.sampling_logprobs[to] = part.sampling_logprobs[from];
        }
    }
}

/// The state of some lanes on the device, and its copy on the host.
///
/// A lane leaves the cache's pages only if a step is made for which [`Lanes::begin`] was not told of room. So the steps are
/// counted on the device: after as many as were announced its lanes are empty, and further ones touch nothing.
#[derive(Debug)]
pub struct Lanes {
    queue: Queue,
    size: LanesSize,
    cache: PagedSize,
    vocabulary: usize,
    state: Arc<Buffer>,
    host: Arc<Buffer>,
    /// A bit for each token of the vocabulary: whether it was seen, where a draw asks.
    seen: Arc<Buffer>,
    seen_host: Arc<Buffer>,
    drawn: Arc<Buffer>,
    drawn_host: Arc<Buffer>,
    /// Lanes of the steps at hand, with empty ones, and steps.
    current: (usize, usize),
}

/// Where each part of the state begins, in bytes, for a number of lanes.
#[derive(Clone, Copy, Debug)]
struct Places {
    tokens: usize,
    positions: usize,
    steps: usize,
    uniforms: usize,
    tables: usize,
    pieces: usize,
    members: usize,
    end: usize,
}

/// Words before the first piece: how many there are, and what aligns them.
const PIECES_HEAD: usize = 4;

impl Places {
    fn of(size: LanesSize, page_tokens: usize) -> Self {
        let LanesSize { lanes, steps, pages, .. } = size;
        let most = most_pieces(lanes, pages, page_tokens);
        let tokens = 8 * lanes;
        let positions = tokens + 4 * lanes;
        let counters = positions + 4 * lanes;
        let uniforms = (counters + 4 * lanes).next_multiple_of(8);
        let tables = uniforms + 8 * lanes * steps;
        let pieces = (tables + 4 * pages).next_multiple_of(16);
        let members = pieces + 4 * PIECES_HEAD + 16 * most;
        Self { tokens, positions, steps: counters, uniforms, tables, pieces, members, end: members + 4 * most }
    }
}

/// Views of the state for some number of lanes.
#[derive(Clone, Copy, Debug)]
pub struct LanesView<'b> {
    /// How many lanes.
    pub lanes: usize,
    /// Most steps.
    pub most_steps: usize,
    /// `[lanes, 2]`: where the page list begins, and the context with this step's token; 0 for none.
    pub(super) rows: Pointer<'b>,
    /// Page lists.
    pub(super) tables: Pointer<'b>,
    /// `[4 + 4 P]`: the number of pieces, and at a multiple of 16 bytes the pieces.
    pub(super) pieces: Pointer<'b>,
    /// `[P]`: their members.
    pub(super) members: Pointer<'b>,
    pub(super) sharing: PageSharing,
    /// `[lanes]`: this step's tokens.
    pub tokens: Pointer<'b>,
    /// `[lanes]`: their positions.
    pub positions: Pointer<'b>,
    /// `[lanes, ceil(V / 32)]`: bits of seen tokens.
    pub(super) seen: Pointer<'b>,
    pub(super) steps: Pointer<'b>,
    pub(super) uniforms: Pointer<'b>,
    pub(super) drawn: Pointer<'b>,
    pub(super) logprobs: Pointer<'b>,
    pub(super) cache: PagedSize,
    pub(super) vocabulary: usize,
}

impl Lanes {
    /// Memory for so many lanes over a cache.
    ///
    /// # Errors
    /// If the device has too little memory, or the cache has 2^32 tokens or more.
    pub fn new(queue: &Queue, size: LanesSize, cache: PagedSize, vocabulary: usize) -> Result<Self, Error> {
        let tokens = cache.pages.checked_mul(cache.page_tokens).filter(|&tokens| tokens < u32::MAX as usize);
        if tokens.is_none() || cache.page_tokens == 0 || size.lanes == 0 || size.steps == 0 {
            return Err(argument("lanes", "size", (size, cache), "lanes and steps over fewer than 2^32 - 1 tokens"));
        }
        if !(1..=MOST_SHARING).contains(&size.sharing.lanes) {
            return Err(argument("lanes", "sharing", size.sharing.lanes, format!("1 to {MOST_SHARING}")));
        }
        let (state, drawn) = (Places::of(size, cache.page_tokens).end, 12 * size.lanes * size.steps);
        let seen = Self::seen_bytes(size.lanes, vocabulary);
        Ok(Self {
            queue: queue.clone(),
            size,
            cache,
            vocabulary,
            state: Arc::new(Buffer::device(queue, state)?),
            host: Arc::new(Buffer::pinned(queue, state)?),
            seen: Arc::new(Buffer::device(queue, seen)?),
            seen_host: Arc::new(Buffer::pinned(queue, seen)?),
            drawn: Arc::new(Buffer::device(queue, drawn)?),
            drawn_host: Arc::new(Buffer::pinned(queue, drawn)?),
            current: (0, 0),
        })
    }

    /// Bytes that their state takes beside the bits of seen tokens, on pages of so many tokens.
    pub fn state_bytes(size: LanesSize, page_tokens: usize) -> usize {
        Places::of(size, page_tokens).end + 12 * size.lanes * size.steps
    }

    /// Bytes that the bits of seen tokens take.
    pub fn seen_bytes(lanes: usize, vocabulary: usize) -> usize {
        4 * lanes * vocabulary.div_ceil(32)
    }

    /// What it has room for.
    pub fn size(&self) -> LanesSize {
        self.size
    }

    /// Views for the first `lanes`.
    ///
    /// # Errors
    /// If there is no room for so many.
    pub fn view(&self, lanes: usize) -> Result<LanesView<'_>, Error> {
        if lanes > self.size.lanes {
            return Err(argument("lanes", "lanes", lanes, format!("at most {}", self.size.lanes)));
        }
        let LanesSize { steps, pages, sharing, .. } = self.size;
        let places = Places::of(LanesSize { lanes, ..self.size }, self.cache.page_tokens);
        let most = most_pieces(lanes, pages, self.cache.page_tokens);
        let array = |first, len, dtype| self.state.array(first, len, dtype);
        Ok(LanesView {
            lanes,
            most_steps: steps,
            rows: array(0, 2 * lanes, DType::U32)?,
            tables: array(places.tables, pages, DType::U32)?,
            pieces: array(places.pieces, PIECES_HEAD + 4 * most, DType::U32)?,
            members: array(places.members, most, DType::U32)?,
            sharing,
            tokens: array(places.tokens, lanes, DType::U32)?,
            positions: array(places.positions, lanes, DType::U32)?,
            seen: self.seen.array(0, lanes * self.vocabulary.div_ceil(32), DType::U32)?,
            steps: array(places.steps, lanes, DType::U32)?,
            uniforms: array(places.uniforms, lanes * steps, DType::F64)?,
            drawn: self.drawn.array(0, lanes * steps, DType::U32)?,
            logprobs: self.drawn.array(4 * lanes * steps, 2 * lanes * steps, DType::F32)?,
            cache: self.cache,
            vocabulary: self.vocabulary,
        })
    }

    /// Sets the lanes for the next `steps`; those beyond, up to `bucket`, are empty. `uniforms`: a number from 0 to 1 for each
    /// step and lane, `[steps, lanes]`.
    ///
    /// # Errors
    /// If there is no room for so many lanes, steps or pages, or a lane's token or pages are not there.
    pub fn begin(&mut self, lanes: &[Lane<'_>], bucket: usize, steps: usize, uniforms: &[f64]) -> Result<(), Error> {
        const WHAT: &str = "lanes";
        let PagedSize { pages: num_pages, page_tokens } = self.cache;
        let most = self.size.steps;
        if lanes.len() > bucket || bucket > self.size.lanes || steps == 0 || steps > most {
            return Err(argument(WHAT, "lanes", (lanes.len(), bucket, steps), self.size));
        }
        if uniforms.len() != lanes.len() * steps {
            return Err(argument(WHAT, "uniforms", uniforms.len(), lanes.len() * steps));
        }
        let places = Places::of(LanesSize { lanes: bucket, ..self.size }, page_tokens);
        // Steps count up to `most`, where lanes become empty.
        let first = most - steps;
        let mut words = vec![0u32; (places.uniforms - 8 * bucket) / 4];
        let (mut rows, mut tables) = (vec![0u32; 2 * bucket], Vec::new());
        let mut numbers = vec![0f64; bucket * most];
        for (index, lane) in lanes.iter().enumerate() {
            let Lane { token, context, pages, .. } = *lane;
            let needed = (context + steps).div_ceil(page_tokens);
            let Some(pages) = pages.get(..needed) else {
                return Err(argument(WHAT, "pages", pages.len(), format!("{needed} for {context} + {steps} tokens")));
            };
            if let Some(page) = pages.iter().find(|&&page| page as usize >= num_pages) {
                return Err(argument(WHAT, "pages", page, format!("below {num_pages}")));
            }
            if token as usize >= self.vocabulary {
                return Err(argument(WHAT, "token", token, format!("below {}", self.vocabulary)));
            }
            rows[2 * index] = tables.len() as u32;
            rows[2 * index + 1] = context as u32 + 1;
            words[index] = token;
            words[bucket + index] = context as u32;
            words[2 * bucket + index] = first as u32;
            for step in 0..steps {
                numbers[(first + step) * bucket + index] = uniforms[step * lanes.len() + index];
            }
            tables.extend_from_slice(pages);
        }
        if tables.len() > self.size.pages {
            return Err(argument(WHAT, "pages", tables.len(), format!("at most {}", self.size.pages)));
        }
        let firsts: Vec<u32> = rows.chunks_exact(2).map(|row| row[0]).collect();
        let LanePieces { pieces, members } = LanePieces::of(lanes, &firsts, steps, page_tokens, self.size.sharing);
        let host = unshared(&mut self.host)?;
        host.write(0, &rows)?;
        host.write(8 * bucket, &words)?;
        host.write(places.uniforms, &numbers)?;
        host.write(places.tables, &tables)?;
        host.write(places.pieces, &[pieces.len() as u32, 0, 0, 0])?;
        host.write(places.pieces + 4 * PIECES_HEAD, pieces.as_flattened())?;
        host.write(places.members, &members)?;
        for (first, bytes) in [
            (0, places.tables + 4 * tables.len()),
            (places.pieces, 4 * (PIECES_HEAD + 4 * pieces.len())),
            (places.members, 4 * members.len()),
        ] {
            if bytes > 0 {
                let used = first..first + bytes;
                self.queue.copy(&self.host.part(used.clone())?, &self.state.part(used)?, &Ticket::done())?;
            }
        }
        self.current = (bucket, steps);
        if lanes.iter().all(|lane| lane.seen.is_empty()) { Ok(()) } else { self.show_seen(lanes) }
    }

    /// Sends the bits of the tokens that each lane has seen.
    fn show_seen(&mut self, lanes: &[Lane<'_>]) -> Result<(), Error> {
        let words = self.vocabulary.div_ceil(32);
        let mut bits = vec![0u32; lanes.len() * words];
        for (lane, bits) in lanes.iter().zip(bits.chunks_exact_mut(words.max(1))) {
            for &token in lane.seen {
                if token as usize >= self.vocabulary {
                    return Err(argument("lanes", "seen", token, format!("below {}", self.vocabulary)));
                }
                bits[token as usize / 32] |= 1 << (token % 32);
            }
        }
        unshared(&mut self.seen_host)?.write(0, &bits)?;
        let bytes = 4 * bits.len();
        self.queue.copy(&self.seen_host.part(0..bytes)?, &self.seen.part(0..bytes)?, &Ticket::done())?;
        Ok(())
    }

    /// Waits for the steps since [`Lanes::begin`] and returns what the first `lanes` drew.
    ///
    /// # Errors
    /// If a step failed on the device.
    pub fn finish(&mut self, lanes: usize) -> Result<Drawn, Error> {
        let ((bucket, steps), most) = (self.current, self.size.steps);
        let bytes = 12 * bucket * most;
        let from = self.drawn.part(0..bytes)?;
        self.queue.copy(&from, &self.drawn_host.part(0..bytes)?, &Ticket::done())?.wait(None)?;
        let first = most - steps;
        self.drawn_host.with_bytes(|bytes| {
            let words = |from: usize| {
                (first..most).flat_map(move |step| (0..lanes).map(move |lane| from + step * bucket + lane)).map(|at| {
                    let bytes: [u8; 4] = [0, 1, 2, 3].map(|byte| bytes[4 * at + byte]);
                    u32::from_ne_bytes(bytes)
                })
            };
            Drawn {
                tokens: words(0).collect(),
                logprobs: words(bucket * most).map(f32::from_bits).collect(),
                sampling_logprobs: words(2 * bucket * most).map(f32::from_bits).collect(),
            }
        })
    }
}

/// The buffer for writing: nobody else has it between two copies.
fn unshared(buffer: &mut Arc<Buffer>) -> Result<&mut Buffer, Error> {
    Arc::get_mut(buffer).ok_or_else(|| argument("lanes", "buffer", "shared", "a buffer of its own"))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{Drawn, Lane, Lanes, LanesSize, PageSharing};
    use crate::device::Queue;
    use crate::kernels::cuda::PagedSize;

    fn lanes() -> Lanes {
        let size = LanesSize { lanes: 4, steps: 3, pages: 6, sharing: PageSharing { lanes: 2, from: 0 } };
        Lanes::new(&Queue::of(&Device::Cpu).unwrap(), size, PagedSize { pages: 10, page_tokens: 4 }, 50).unwrap()
    }

    #[test]
    fn what_would_leave_the_cache_or_the_vocabulary_is_refused() {
        let mut lanes = lanes();
        let lane = |token, context, pages| Lane { token, context, pages, seen: &[] };
        let mut problem = |lane: Lane<'_>, steps: usize| {
            lanes.begin(&[lane], 2, steps, &vec![0.5; steps]).err().map(|error| error.to_string())
        };
        assert_eq!(problem(lane(49, 6, &[0, 9]), 2), None);
        assert!(problem(lane(50, 6, &[0, 9]), 2).unwrap().contains("below 50"));
        assert!(problem(lane(49, 6, &[0, 10]), 2).unwrap().contains("below 10"));
        assert!(problem(lane(49, 6, &[0, 9]), 3).unwrap().contains("3 for 6 + 3 tokens"));
        assert!(problem(lane(49, 1, &[0]), 4).unwrap().contains("lanes"));
        assert!(problem(lane(49, 23, &[0; 7]), 3).unwrap().contains("at most 6"));
        assert!(lanes.begin(&[lane(1, 0, &[0]), lane(1, 0, &[1])], 1, 1, &[0.5, 0.5]).is_err());
        let seen = Lane { seen: &[3, 50], ..lane(1, 0, &[0]) };
        assert!(lanes.begin(&[seen], 1, 1, &[0.5]).unwrap_err().to_string().contains("seen"));
        assert!(lanes.view(5).is_err() && lanes.begin(&[lane(1, 0, &[0])], 1, 1, &[]).is_err());
    }

    #[test]
    fn parts_of_lanes_come_to_their_places() {
        let mut all = Drawn::empty(6);
        let of = |tokens: &[u32]| Drawn {
            tokens: tokens.to_vec(),
            logprobs: tokens.iter().map(|&token| token as f32).collect(),
            sampling_logprobs: tokens.iter().map(|&token| -(token as f32)).collect(),
        };
        all.put(&of(&[1, 2, 4, 5]), (0, 2), 3);
        all.put(&of(&[3, 6]), (2, 1), 3);
        assert_eq!(all.tokens, [1, 2, 3, 4, 5, 6]);
        assert_eq!(all.logprobs, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(all.sampling_logprobs, [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]);
    }

    #[test]
    fn numbers_lie_at_the_last_steps() {
        let mut lanes = lanes();
        let one = Lane { token: 7, context: 5, pages: &[3, 1], seen: &[0, 7, 31] };
        let two = Lane { token: 8, context: 0, pages: &[2], seen: &[49, 8, 32] };
        lanes.begin(&[one, two], 3, 2, &[0.1, 0.2, 0.3, 0.4]).unwrap();
        let bytes = lanes.state.with_bytes(<[u8]>::to_vec).unwrap();
        let word = |at: usize| u32::from_ne_bytes(bytes[4 * at..4 * at + 4].try_into().unwrap());
        assert_eq!((0..6).map(word).collect::<Vec<_>>(), [0, 6, 2, 1, 0, 0]);
        assert_eq!((6..15).map(word).collect::<Vec<_>>(), [7, 8, 0, 5, 0, 0, 1, 1, 0]);
        let number = |at: usize| f64::from_ne_bytes(bytes[64 + 8 * at..72 + 8 * at].try_into().unwrap());
        assert_eq!((0..9).map(number).collect::<Vec<_>>(), [0.0, 0.0, 0.0, 0.1, 0.2, 0.0, 0.3, 0.4, 0.0]);
        assert_eq!((34..37).map(word).collect::<Vec<_>>(), [3, 1, 2]);
        let bytes = lanes.seen.with_bytes(<[u8]>::to_vec).unwrap();
        let words: Vec<u32> =
            bytes[..16].chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [1 | 1 << 7 | 1 << 31, 0, 1 << 8, 1 | 1 << 17]);
    }
}
