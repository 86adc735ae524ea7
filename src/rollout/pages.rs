//! Which pages of the key-value cache are in use, and by how many sequences.
//!
//! Host-side accounting only; what lies in a page is the business of [`super::kv_cache`]. The scheduler is the only
//! caller. Invariant: a page is either free or has a count of at least one; the counts of a page are exactly its
//! appearances in the page lists of running sequences and prefilled prompts.

use super::Error;

/// Tokens in a page. Large enough that a page of keys is a long stretch of memory (4 KiB per head of 64 f32) and page
/// lists stay short; small enough that a sequence wastes 8 tokens on average. vLLM's default as well.
pub const PAGE_TOKENS: usize = 16;

/// Index of a page in the cache.
pub type PageId = u32;

/// Pages that `tokens` tokens need.
pub const fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

/// Hands out pages and counts who uses them.
#[derive(Debug)]
pub struct BlockAllocator {
    references: Vec<u32>,
    free: Vec<PageId>,
    peak_pages: usize,
}

impl BlockAllocator {
    /// All of `num_pages` pages are free. Low ids are handed out first.
    pub fn new(num_pages: usize) -> Self {
        Self { references: vec![0; num_pages], free: (0..num_pages as PageId).rev().collect(), peak_pages: 0 }
    }

    /// Pages there are.
    pub fn num_pages(&self) -> usize {
        self.references.len()
    }

    /// Pages nobody uses.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Most pages ever in use at the same time.
    pub fn peak_pages(&self) -> usize {
        self.peak_pages
    }

    /// How many users `page` has.
    pub fn references(&self, page: PageId) -> u32 {
        self.references[page as usize]
    }

    /// A page with one user, or `None` if all are in use.
    pub fn allocate(&mut self) -> Option<PageId> {
        let page = self.free.pop()?;
        self.references[page as usize] = 1;
        self.peak_pages = self.peak_pages.max(self.references.len() - self.free.len());
        Some(page)
    }

    /// Appends pages to `pages` until it holds `tokens` tokens; takes none if there are not enough.
    pub fn extend(&mut self, pages: &mut Vec<PageId>, tokens: usize) -> bool {
        let missing = pages_for(tokens).saturating_sub(pages.len());
        if missing > self.free.len() {
            return false;
        }
        pages.extend((0..missing).map_while(|_| self.allocate()));
        true
    }

    /// Adds a user to each of `pages`.
    ///
    /// # Errors
    /// If one of them is free.
    pub fn retain(&mut self, pages: &[PageId]) -> Result<(), Error> {
        for &page in pages {
            match self.references.get_mut(page as usize) {
                Some(count) if *count > 0 => *count += 1,
                _ => return Err(Error::FreePage { page }),
            }
        }
        Ok(())
    }

    /// Takes a user from each of `pages`; those without users become free.
    ///
    /// # Errors
    /// If one of them is free already.
    pub fn release(&mut self, pages: &[PageId]) -> Result<(), Error> {
        for &page in pages {
            match self.references.get_mut(page as usize) {
                Some(count) if *count > 0 => *count -= 1,
                _ => return Err(Error::FreePage { page }),
            }
            if self.references[page as usize] == 0 {
                self.free.push(page);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn pages_come_back_when_their_last_user_leaves() {
        let mut allocator = BlockAllocator::new(3);
        let first = allocator.allocate().unwrap();
        allocator.retain(&[first]).unwrap();
        allocator.release(&[first]).unwrap();
        assert_eq!((allocator.references(first), allocator.free_pages()), (1, 2));
        allocator.release(&[first]).unwrap();
        assert_eq!((allocator.references(first), allocator.free_pages(), allocator.peak_pages()), (0, 3, 1));
        assert!(matches!(allocator.release(&[first]), Err(Error::FreePage { page: 0 })));
        assert!(matches!(allocator.retain(&[first]), Err(Error::FreePage { page: 0 })));
        assert!(matches!(allocator.retain(&[9]), Err(Error::FreePage { page: 9 })));
    }

    #[test]
    fn extend_takes_all_or_nothing() {
        let mut allocator = BlockAllocator::new(3);
        let mut pages = Vec::new();
        assert!(allocator.extend(&mut pages, 17));
        assert_eq!(pages, [0, 1]);
        assert!(!allocator.extend(&mut pages, 5 * PAGE_TOKENS));
        assert_eq!((pages.len(), allocator.free_pages()), (2, 1));
        assert!(allocator.extend(&mut pages, 32));
        assert!(allocator.extend(&mut pages, 33));
        assert_eq!(allocator.allocate(), None);
    }

    #[test]
    fn random_use_never_hands_out_a_page_twice() {
        let mut stream = Stream::new(5, "allocator test", 0, 0);
        let mut allocator = BlockAllocator::new(20);
        let mut held: Vec<PageId> = Vec::new();
        for _ in 0..5_000 {
            match stream.below(3) {
                0 => {
                    if let Some(page) = allocator.allocate() {
                        assert!(!held.contains(&page));
                        held.push(page);
                    } else {
                        held.sort_unstable();
                        held.dedup();
                        assert_eq!(held.len(), 20);
                        held = (0..20).flat_map(|p| vec![p; allocator.references(p) as usize]).collect();
                    }
                }
                1 if !held.is_empty() => {
                    let page = held[stream.below(held.len() as u64) as usize];
                    allocator.retain(&[page]).unwrap();
                    held.push(page);
                }
                2 if !held.is_empty() => {
                    let page = held.swap_remove(stream.below(held.len() as u64) as usize);
                    allocator.release(&[page]).unwrap();
                }
                _ => {}
            }
            for page in 0..20 {
                assert_eq!(allocator.references(page) as usize, held.iter().filter(|&&p| p == page).count());
            }
        }
        allocator.release(&held).unwrap();
        assert_eq!(allocator.free_pages(), 20);
    }
}
