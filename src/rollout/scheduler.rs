//! Decides, step by step, which tokens of which sequences are computed and where their keys and values lie.
//!
//! The engine asks it to admit, to plan a step, and to take note of what the step computed. A *lane* is a running list
//! of tokens with pages: a prompt being prefilled once for all its samples, or a sample. A prefilled prompt is *ready*
//! until its last sample was forked from it; a fork shares the prompt's pages and copies the last one when it first
//! writes to it. When pages run out, ready prompts and then the youngest lanes give theirs back and are computed again
//! later.
//!
//! Invariants: lanes are sorted by age, and the oldest is never preempted, so every call ends; each page's reference
//! count is its number of appearances in lanes and ready prompts; what is computed for a sequence depends on its own
//! tokens only.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;

use super::Error;
use super::decode_model::{self, Span, StepBatch};
use super::kv_cache::KvCache;
use super::pages::{BlockAllocator, PAGE_TOKENS, PageId, pages_for};
use super::sequence::{Finish, Request, Sequence};

/// Limits the scheduler keeps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Lanes at the same time.
    pub(super) max_num_seqs: usize,
    /// Tokens of a step. Samples that decode always take part; prefilling takes what they leave.
    pub(super) max_batch_tokens: usize,
}

/// A distinct prompt and the requests that have it.
#[derive(Debug)]
struct Prompt<'a> {
    ids: &'a [u32],
    /// Indices of its requests.
    requests: Vec<usize>,
    /// How many of them were forked.
    forked: usize,
    /// Its pages while it is ready.
    pages: Vec<PageId>,
    /// The logits of its last token while it is ready.
    logits: Option<Rc<[f32]>>,
    /// Tokens that were computed before, when pages had to be given back.
    computed: usize,
}

impl Prompt<'_> {
    fn to_fork(&self) -> usize {
        self.requests.len() - self.forked
    }
}

/// What a lane computes.
#[derive(Debug)]
enum Work {
    /// A prompt, for the samples that will be forked from it.
    Prompt(usize),
    /// A sample.
    Sample(Box<Sequence>),
}

#[derive(Debug)]
struct Lane {
    age: u64,
    work: Work,
    pages: Vec<PageId>,
    /// Tokens with keys and values in the pages.
    cached: usize,
    /// Tokens below this were computed before a preemption.
    computed: usize,
}

/// A lane's part of a step.
#[derive(Clone, Copy, Debug)]
struct Part {
    lane: usize,
    tokens: usize,
    logit_row: Option<usize>,
}

/// A step and whose it is.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) batch: StepBatch,
    parts: Vec<Part>,
    /// Tokens of prompts computed for the first time.
    pub(super) prefill_tokens: usize,
    /// Newest tokens of samples.
    pub(super) decode_tokens: usize,
    /// Tokens computed again after a preemption.
    pub(super) recomputed_tokens: usize,
}

/// A new sample that wants its first token.
#[derive(Debug)]
pub(super) struct Fork {
    pub(super) lane: usize,
    /// `[V]`, shared by the prompt's samples.
    pub(super) logits: Rc<[f32]>,
}

/// What became of a lane.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It goes on.
    Stays,
    /// Its sample ended.
    Finished(Finish),
    /// Its prompt is prefilled; the logits of the last token, `[V]`.
    Prefilled(Vec<f32>),
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Scheduler<'a> {
    limits: Limits,
    allocator: BlockAllocator,
    requests: &'a [Request],
    prompts: Vec<Prompt<'a>>,
    /// Prompts to prefill, in order.
    queue: VecDeque<usize>,
    /// Prefilled prompts with samples to fork, in order.
    ready: VecDeque<usize>,
    /// Preempted samples by age, and how many of their tokens were computed.
    preempted: BTreeMap<u64, (Box<Sequence>, usize)>,
    lanes: Vec<Lane>,
    next_age: u64,
    preemptions: usize,
    unfinished: usize,
}

impl<'a> Scheduler<'a> {
    /// Of `requests`, none of which is queued yet.
    pub(super) fn new(limits: Limits, num_pages: usize, requests: &'a [Request]) -> Self {
        Self {
            limits,
            allocator: BlockAllocator::new(num_pages),
            requests,
            queue: VecDeque::new(),
            prompts: Vec::new(),
            ready: VecDeque::new(),
            preempted: BTreeMap::new(),
            lanes: Vec::new(),
            next_age: 0,
            preemptions: 0,
            unfinished: 0,
        }
    }

    /// Queues some of the requests; equal prompts among them become one, at the place of the first.
    pub(super) fn add(&mut self, range: Range<usize>) {
        let mut known: HashMap<&[u32], usize> = HashMap::new();
        self.unfinished += range.len();
        let requests = self.requests;
        for index in range {
            let ids: &'a [u32] = &requests[index].prompt_ids;
            let prompt = *known.entry(ids).or_insert_with(|| {
                let requests = Vec::new();
                self.prompts.push(Prompt { ids, requests, forked: 0, pages: Vec::new(), logits: None, computed: 0 });
                self.queue.push_back(self.prompts.len() - 1);
                self.prompts.len() - 1
            });
            self.prompts[prompt].requests.push(index);
        }
    }

    /// Samples that have not ended.
    pub(super) fn unfinished(&self) -> usize {
        self.unfinished
    }

    /// Lanes there are.
    pub(super) fn num_lanes(&self) -> usize {
        self.lanes.len()
    }

    /// Times a lane, or a ready prompt, had to give its pages back.
    pub(super) fn preemptions(&self) -> usize {
        self.preemptions
    }

    /// The pages.
    pub(super) fn allocator(&self) -> &BlockAllocator {
        &self.allocator
    }

    /// The sample of a lane; `None` where it prefills a prompt.
    pub(super) fn sequence(&self, lane: usize) -> Option<&Sequence> {
        match &self.lanes[lane].work {
            Work::Sample(sequence) => Some(sequence),
            Work::Prompt(_) => None,
        }
    }

    /// As [`Scheduler::sequence`].
    pub(super) fn sequence_mut(&mut self, lane: usize) -> Option<&mut Sequence> {
        match &mut self.lanes[lane].work {
            Work::Sample(sequence) => Some(sequence),
            Work::Prompt(_) => None,
        }
    }

    /// Lets sequences in while there is room: preempted ones first, then samples of ready prompts, then new prompts.
    /// `open` makes the sequence of a request and its prompt. The forks want their first token; call again after they have it and
    /// [`Scheduler::settle`] knows who ended with it, until no fork comes back.
    pub(super) fn admit(&mut self, mut open: impl FnMut(usize, usize) -> Sequence) -> Result<Vec<Fork>, Error> {
        let mut forks = Vec::new();
        while self.lanes.len() < self.limits.max_num_seqs {
            if !self.preempted.is_empty() {
                // Nobody overtakes a preempted sequence.
                if !self.resume()? {
                    break;
                }
            } else if let Some(&prompt) = self.ready.front() {
                if !self.has_room(0) {
                    break;
                }
                let request = self.prompts[prompt].requests[self.prompts[prompt].forked];
                forks.extend(self.fork(prompt, open(request, prompt))?);
            } else if !self.start_prompt()? {
                break;
            }
        }
        if self.lanes.is_empty() && self.unfinished > 0 {
            return Err(self.stuck());
        }
        Ok(forks)
    }

    /// Whether a newcomer that takes `pages` pages leaves one for each lane, which each may soon need. A lane alone
    /// always has room: the engine refuses sequences that do not fit by themselves.
    fn has_room(&self, pages: usize) -> bool {
        self.lanes.is_empty() || self.allocator.free_pages() > pages + self.lanes.len()
    }

    /// Lets the oldest preempted sample in again, if there is room.
    fn resume(&mut self) -> Result<bool, Error> {
        let Some((age, (sequence, computed))) = self.preempted.pop_first() else { return Ok(false) };
        let tokens = self.prompts[sequence.prompt].ids.len() + sequence.generated.len();
        let pages = loop {
            if let Some(pages) = self.take_pages(sequence.prompt, tokens)? {
                break pages;
            }
            if !self.lanes.is_empty() {
                self.preempted.insert(age, (sequence, computed));
                return Ok(false);
            }
            self.drop_ready_prompt()?;
        };
        let (cached, pages) = pages;
        let place = self.lanes.partition_point(|lane| lane.age < age);
        self.lanes.insert(place, Lane { age, work: Work::Sample(sequence), pages, cached, computed });
        Ok(true)
    }

    /// Starts to prefill the next prompt, unless the samples of those that run fill all lanes or there is no room.
    fn start_prompt(&mut self) -> Result<bool, Error> {
        let promised: usize = self
            .lanes
            .iter()
            .map(|lane| match lane.work {
                Work::Prompt(prompt) => self.prompts[prompt].to_fork(),
                Work::Sample(_) => 1,
            })
            .sum();
        let Some(&prompt) = self.queue.front() else { return Ok(false) };
        if promised >= self.limits.max_num_seqs {
            return Ok(false);
        }
        let Some((cached, pages)) = self.take_pages(prompt, self.prompts[prompt].ids.len())? else {
            return Ok(false);
        };
        self.queue.pop_front();
        let computed = self.prompts[prompt].computed;
        self.push_lane(Work::Prompt(prompt), pages, cached, computed);
        Ok(true)
    }

    /// Pages for `tokens` tokens that begin with `prompt`, and how many of the tokens are in them already because
    /// somebody else has the same prompt. At least one token is left to compute. `None` without room.
    fn take_pages(&mut self, prompt: usize, tokens: usize) -> Result<Option<(usize, Vec<PageId>)>, Error> {
        let whole = (self.prompts[prompt].ids.len().min(tokens - 1)) / PAGE_TOKENS;
        let mut pages = self.prompt_pages(prompt, whole);
        let cached = pages.len() * PAGE_TOKENS;
        if !self.has_room(pages_for(tokens) - pages.len()) {
            return Ok(None);
        }
        self.allocator.retain(&pages)?;
        if self.allocator.extend(&mut pages, tokens) {
            return Ok(Some((cached, pages)));
        }
        self.allocator.release(&pages)?;
        Ok(None)
    }

    /// The first `whole` pages of a prompt that was computed before and is still in the cache; otherwise none.
    fn prompt_pages(&self, prompt: usize, whole: usize) -> Vec<PageId> {
        if self.prompts[prompt].computed == 0 && self.prompts[prompt].forked == 0 {
            return Vec::new();
        }
        let of_lane = |lane: &Lane| match &lane.work {
            Work::Sample(sequence) => sequence.prompt == prompt && lane.cached >= whole * PAGE_TOKENS,
            Work::Prompt(_) => false,
        };
        if self.prompts[prompt].logits.is_some() {
            self.prompts[prompt].pages[..whole].to_vec()
        } else {
            self.lanes.iter().find(|lane| of_lane(lane)).map_or_else(Vec::new, |lane| lane.pages[..whole].to_vec())
        }
    }

    fn push_lane(&mut self, work: Work, pages: Vec<PageId>, cached: usize, computed: usize) {
        self.lanes.push(Lane { age: self.next_age, work, pages, cached, computed });
        self.next_age += 1;
    }

    /// Makes a lane for a sample of a ready prompt, on the prompt's pages.
    fn fork(&mut self, prompt: usize, sequence: Sequence) -> Result<Option<Fork>, Error> {
        let state = &mut self.prompts[prompt];
        let Some(logits) = state.logits.clone() else { return Ok(None) };
        state.forked += 1;
        let cached = state.ids.len();
        let pages = if state.to_fork() > 0 {
            self.allocator.retain(&state.pages)?;
            state.pages.clone()
        } else {
            // The last sample takes over the prompt's share.
            self.ready.pop_front();
            state.logits = None;
            std::mem::take(&mut state.pages)
        };
        self.push_lane(Work::Sample(Box::new(sequence)), pages, cached, 0);
        Ok(Some(Fork { lane: self.lanes.len() - 1, logits }))
    }

    /// The youngest ready prompt gives its pages back and is queued again; an error if there is none.
    fn drop_ready_prompt(&mut self) -> Result<(), Error> {
        let Some(prompt) = self.ready.pop_back() else { return Err(self.stuck()) };
        let state = &mut self.prompts[prompt];
        state.logits = None;
        state.computed = state.ids.len();
        self.allocator.release(&std::mem::take(&mut state.pages))?;
        self.queue.push_front(prompt);
        self.preemptions += 1;
        Ok(())
    }

    /// The youngest lane gives its pages back and waits.
    fn preempt_youngest(&mut self) -> Result<(), Error> {
        let Some(lane) = self.lanes.pop() else { return Err(self.stuck()) };
        self.allocator.release(&lane.pages)?;
        let computed = lane.computed.max(lane.cached);
        match lane.work {
            Work::Prompt(prompt) => {
                self.prompts[prompt].computed = computed;
                self.queue.push_front(prompt);
            }
            Work::Sample(sequence) => {
                self.preempted.insert(lane.age, (sequence, computed));
            }
        }
        self.preemptions += 1;
        Ok(())
    }

    fn stuck(&self) -> Error {
        Error::Stuck { waiting: self.unfinished, num_pages: self.allocator.num_pages() }
    }

    /// Tokens of a lane, cached or not.
    fn num_tokens(&self, lane: &Lane) -> usize {
        match &lane.work {
            Work::Prompt(prompt) => self.prompts[*prompt].ids.len(),
            Work::Sample(sequence) => self.prompts[sequence.prompt].ids.len() + sequence.generated.len(),
        }
    }

    /// Whether all lanes are samples that want their next token.
    pub(super) fn is_decoding(&self) -> bool {
        !self.lanes.is_empty() && self.lanes.iter().all(|lane| self.is_lane_decoding(lane))
    }

    fn is_lane_decoding(&self, lane: &Lane) -> bool {
        matches!(lane.work, Work::Sample(_)) && lane.cached + 1 == self.num_tokens(lane)
    }

    /// Makes room for the next `steps` tokens of each lane, all of which decode; returns for how many there is room, at least
    /// one. Lanes may have to leave for it.
    pub(super) fn reserve(&mut self, steps: usize, cache: &mut KvCache) -> Result<usize, Error> {
        self.make_all_writable(cache)?;
        let missing = |lanes: &[Lane], steps: usize| -> usize {
            lanes.iter().map(|lane| pages_for(lane.cached + steps).saturating_sub(lane.pages.len())).sum()
        };
        let mut steps = steps.max(1);
        while steps > 1 && missing(&self.lanes, steps) > self.allocator.free_pages() {
            steps /= 2;
        }
        for lane in &mut self.lanes {
            if !self.allocator.extend(&mut lane.pages, lane.cached + steps) {
                return Err(Error::Stuck { waiting: self.unfinished, num_pages: self.allocator.num_pages() });
            }
        }
        Ok(steps)
    }

    /// What the lanes are at: newest token, tokens in the cache, pages, tokens seen where a penalty asks.
    pub(super) fn at(&self) -> Vec<decode_model::Lane<'_>> {
        let at = |lane| {
            let Lane { work, cached: context, pages, .. }: &Lane = lane;
            let (token, seen): (_, &[u32]) = match work {
                Work::Sample(sequence) => (sequence.generated.last().copied(), &sequence.seen),
                Work::Prompt(_) => (None, &[]),
            };
            decode_model::Lane { token: token.unwrap_or(0), context: *context, pages, seen }
        };
        self.lanes.iter().map(at).collect()
    }

    /// Takes note that a lane's newest tokens are in the cache.
    pub(super) fn advance_lane(&mut self, lane: usize, tokens: usize) {
        self.lanes[lane].cached += tokens;
    }

    /// Every lane that decodes has a page of its own for its next token.
    fn make_all_writable(&mut self, cache: &mut KvCache) -> Result<(), Error> {
        let mut lane = 0;
        while lane < self.lanes.len() {
            if self.lanes[lane].cached + 1 == self.num_tokens(&self.lanes[lane]) {
                self.make_writable(lane, cache)?;
            }
            lane += 1;
        }
        Ok(())
    }

    /// Chooses the tokens of the next step and makes room for them, copying shared pages that will be written to.
    ///
    /// With `is_apart`, samples that decode wait while prompts are computed.
    pub(super) fn plan(&mut self, is_apart: bool, cache: &mut KvCache) -> Result<Plan, Error> {
        self.make_all_writable(cache)?;
        let mut plan = Plan::default();
        let waits = is_apart && !self.is_decoding();
        let decoding = self.lanes.iter().filter(|lane| !waits && lane.cached + 1 == self.num_tokens(lane)).count();
        let mut budget = self.limits.max_batch_tokens.saturating_sub(decoding);
        for (index, lane) in self.lanes.iter().enumerate() {
            let left = self.num_tokens(lane) - lane.cached;
            let tokens = if left == 1 { 1 } else { left.min(budget) };
            if left > 1 {
                budget -= tokens;
            }
            if tokens > 0 && !(waits && self.is_lane_decoding(lane)) {
                self.add_part(&mut plan, index, tokens);
            }
        }
        Ok(plan)
    }

    /// Gives the lane a page of its own for its next token. Whoever is youngest makes room, perhaps the lane itself.
    fn make_writable(&mut self, index: usize, cache: &mut KvCache) -> Result<(), Error> {
        while let Some(lane) = self.lanes.get(index) {
            let slot = lane.cached / PAGE_TOKENS;
            let shared = lane.pages.get(slot).copied();
            if shared.is_some_and(|page| self.allocator.references(page) == 1) {
                return Ok(());
            }
            if let Some(page) = self.allocator.allocate() {
                if let Some(shared) = shared {
                    cache.copy_page(shared, page)?;
                    self.allocator.release(&[shared])?;
                    self.lanes[index].pages[slot] = page;
                } else {
                    self.lanes[index].pages.push(page);
                }
                return Ok(());
            }
            if self.ready.is_empty() {
                if self.lanes.len() == 1 {
                    return Err(self.stuck());
                }
                self.preempt_youngest()?;
            } else {
                self.drop_ready_prompt()?;
            }
        }
        Ok(())
    }

    fn add_part(&self, plan: &mut Plan, index: usize, tokens: usize) {
        let lane = &self.lanes[index];
        let (prompt_ids, generated): (&[u32], &[u32]) = match &lane.work {
            Work::Prompt(prompt) => (self.prompts[*prompt].ids, &[]),
            Work::Sample(sequence) => (self.prompts[sequence.prompt].ids, &sequence.generated),
        };
        let end = lane.cached + tokens;
        let batch = &mut plan.batch;
        let first = batch.tokens.len();
        batch.tokens.extend(prompt_ids.iter().chain(generated).skip(lane.cached).take(tokens));
        batch.positions.extend(lane.cached as u32..end as u32);
        let is_last = end == prompt_ids.len() + generated.len();
        let logit_row = is_last.then_some(batch.logit_rows.len());
        if is_last {
            batch.logit_rows.push(first + tokens - 1);
        }
        batch.spans.push(Span { tokens: first..first + tokens, pages: lane.pages.clone(), context: lane.cached });
        plan.parts.push(Part { lane: index, tokens, logit_row });
        let again = lane.computed.min(end).saturating_sub(lane.cached);
        plan.recomputed_tokens += again;
        match lane.work {
            Work::Prompt(_) => plan.prefill_tokens += tokens - again,
            Work::Sample(_) => plan.decode_tokens += tokens - again,
        }
    }

    /// Takes note that a planned step was computed. Returns the lanes that got logits, ascending, and in which row.
    pub(super) fn advance(&mut self, plan: &Plan) -> Vec<(usize, usize)> {
        for part in &plan.parts {
            self.lanes[part.lane].cached += part.tokens;
        }
        plan.parts.iter().filter_map(|part| part.logit_row.map(|row| (part.lane, row))).collect()
    }

    /// Removes the lanes that are done: prompts become ready, samples that ended are returned. One outcome per lane.
    pub(super) fn settle(&mut self, outcomes: Vec<Outcome>) -> Result<Vec<(Sequence, Finish)>, Error> {
        let mut finished = Vec::new();
        for (lane, outcome) in std::mem::take(&mut self.lanes).into_iter().zip(outcomes) {
            match (lane.work, outcome) {
                (Work::Prompt(prompt), Outcome::Prefilled(logits)) => {
                    let state = &mut self.prompts[prompt];
                    state.pages = lane.pages;
                    state.logits = Some(logits.into());
                    state.computed = state.ids.len();
                    self.ready.push_back(prompt);
                }
                (Work::Sample(sequence), Outcome::Finished(finish)) => {
                    self.allocator.release(&lane.pages)?;
                    self.unfinished -= 1;
                    finished.push((*sequence, finish));
                }
                (work, _) => self.lanes.push(Lane { work, ..lane }),
            }
        }
        Ok(finished)
    }
}

#[cfg(test)]
impl Scheduler<'_> {
    /// Checks that reference counts are the appearances in page lists, and that nobody may write to a shared page.
    pub(super) fn check_pages(&self) {
        let lists = || self.lanes.iter().map(|lane| &lane.pages).chain(self.prompts.iter().map(|prompt| &prompt.pages));
        let mut counts = vec![0; self.allocator.num_pages()];
        for &page in lists().flatten() {
            counts[page as usize] += 1;
        }
        for (page, &count) in counts.iter().enumerate() {
            assert_eq!(self.allocator.references(page as PageId), count, "page {page}");
        }
        assert_eq!(self.allocator.free_pages(), counts.iter().filter(|&&count| count == 0).count());
        assert!(self.lanes.windows(2).all(|pair| pair[0].age < pair[1].age), "lanes are not sorted by age");
    }
}
