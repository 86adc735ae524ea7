//! Where a step's tokens go in a paged cache and what they see: lists on the device, checked before they are sent there, so
//! that no kernel leaves the cache.

use candle_core::{Device, Tensor};

use crate::device::{Error, Pointer, argument, array, upload_u32, upload_u64};

/// The slot of a token that is not stored.
pub const NO_SLOT: u32 = u32::MAX;

/// The size of a cache in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagedSize {
    /// `P`.
    pub pages: usize,
    /// `T`, tokens of a page.
    pub page_tokens: usize,
}

/// What a step says of its tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PagedLists {
    /// `page * T + place` of each new token, all different, or [`NO_SLOT`].
    pub slots: Vec<u32>,
    /// For each query row where its page list starts in `tables`, and how many keys it sees. Neighbouring rows of a prompt,
    /// each of which sees one key more, share their loads.
    pub rows: Vec<[u32; 2]>,
    /// The page lists of all sequences, each in order of position.
    pub tables: Vec<u32>,
}

/// A step's lists on the device.
#[derive(Clone, Debug)]
pub struct PagedStep {
    /// u32: the rows, the slots, the tables.
    numbers: Tensor,
    size: PagedSize,
    num_slots: usize,
    num_rows: usize,
    max_context: usize,
}

impl PagedLists {
    /// The most keys that a row sees.
    pub fn max_context(&self) -> usize {
        self.rows.iter().map(|&[_, context]| context as usize).max().unwrap_or(0)
    }

    /// That slots and pages lie in a cache and page lists are as long as contexts.
    fn check(&self, size: PagedSize) -> Result<(), Error> {
        const WHAT: &str = "paged step";
        let PagedSize { pages, page_tokens } = size;
        let tokens = pages.checked_mul(page_tokens).filter(|&tokens| tokens < NO_SLOT as usize);
        let Some(tokens) = tokens.filter(|_| page_tokens > 0) else {
            return Err(argument(WHAT, "size", size, "pages of tokens, fewer than 2^32 - 1 in all"));
        };
        if let Some(slot) = self.slots.iter().find(|&&slot| slot != NO_SLOT && slot as usize >= tokens) {
            return Err(argument(WHAT, "slots", slot, format!("below {tokens}")));
        }
        // Neighbouring rows share a list; what was checked for the last one is not checked again.
        let (mut list, mut checked) = (0, 0);
        for &[first, context] in &self.rows {
            let (first, needed) = (first as usize, (context as usize).div_ceil(page_tokens));
            if first != list {
                (list, checked) = (first, 0);
            }
            if needed > checked {
                let Some(new) = self.tables.get(first + checked..first + needed) else {
                    let got = (first, needed, self.tables.len());
                    return Err(argument(WHAT, "rows", got, "a page list as long as the context"));
                };
                if let Some(page) = new.iter().find(|&&page| page as usize >= pages) {
                    return Err(argument(WHAT, "tables", page, format!("pages below {pages}")));
                }
                checked = needed;
            }
        }
        Ok(())
    }
}

impl PagedStep {
    /// Copies the lists of a step to the device, for caches of a size.
    ///
    /// # Errors
    /// If a slot or a page lies outside of such a cache, a page list is shorter than its context, or memory runs out.
    pub fn new(device: &Device, size: PagedSize, lists: &PagedLists) -> Result<Self, Error> {
        lists.check(size)?;
        let PagedLists { slots, rows, tables } = lists;
        let mut numbers = Vec::with_capacity(2 * rows.len() + slots.len() + tables.len());
        numbers.extend_from_slice(rows.as_flattened());
        numbers.extend_from_slice(slots);
        numbers.extend_from_slice(tables);
        Ok(Self {
            numbers: upload_u32(device, &numbers)?,
            size,
            num_slots: slots.len(),
            num_rows: rows.len(),
            max_context: lists.max_context(),
        })
    }

    /// The size of the caches that it is for.
    pub fn size(&self) -> PagedSize {
        self.size
    }

    /// The most keys that a row sees.
    pub fn max_context(&self) -> usize {
        self.max_context
    }

    /// u32 `[N, 2]`.
    pub(super) fn rows(&self) -> Result<Pointer<'_>, Error> {
        Ok(array(&self.numbers)?.elements(0..2 * self.num_rows))
    }

    /// u32 `[N]`.
    pub(super) fn slots(&self) -> Result<Pointer<'_>, Error> {
        let first = 2 * self.num_rows;
        Ok(array(&self.numbers)?.elements(first..first + self.num_slots))
    }

    /// u32.
    pub(super) fn tables(&self) -> Result<Pointer<'_>, Error> {
        Ok(array(&self.numbers)?.from_element(2 * self.num_rows + self.num_slots))
    }
}

/// The arrays of a cache, keys and values of all layers in any order, for [`copy_pages`](super::copy_pages).
#[derive(Clone, Debug)]
pub struct PageStores {
    /// i64 bits of the arrays' addresses.
    addresses: Tensor,
    /// Kept alive for the addresses.
    stores: Vec<Tensor>,
    pages: usize,
    page_bytes: usize,
}

impl PageStores {
    /// The stores of a cache of `pages` pages, whose tensors they keep.
    ///
    /// # Errors
    /// If they are not arrays of one size on the device, of whole pages of an even number of bytes at multiples of 16.
    pub fn new(device: &Device, stores: &[Tensor], pages: usize) -> Result<Self, Error> {
        const WHAT: &str = "page copy";
        let bytes = |store: &Tensor| store.elem_count() * store.dtype().size_in_bytes();
        let all = stores.first().map_or(0, bytes);
        let page_bytes = all.checked_div(pages).unwrap_or(0);
        if stores.iter().any(|store| bytes(store) != all) || page_bytes * pages != all || !page_bytes.is_multiple_of(2)
        {
            return Err(argument(
                WHAT,
                "stores",
                (all, pages),
                "arrays of one size, whole pages of even numbers of bytes",
            ));
        }
        let addresses = stores.iter().map(|store| Ok(array(store)?.address)).collect::<Result<Vec<u64>, Error>>()?;
        if let Some(odd) = addresses.iter().find(|address| !address.is_multiple_of(16)) {
            return Err(argument(WHAT, "stores", odd, "arrays at multiples of 16 bytes"));
        }
        Ok(Self { addresses: upload_u64(device, &addresses)?, stores: stores.to_vec(), pages, page_bytes })
    }

    /// `P`.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Bytes of a page in one of them.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.stores.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.stores.is_empty()
    }

    pub(super) fn addresses(&self) -> Result<Pointer<'_>, Error> {
        array(&self.addresses)
    }
}

#[cfg(test)]
mod tests {
    use super::{NO_SLOT, PagedLists, PagedSize};

    const SIZE: PagedSize = PagedSize { pages: 5, page_tokens: 4 };

    fn problem(slots: &[u32], rows: &[[u32; 2]], tables: &[u32]) -> Option<String> {
        let lists = PagedLists { slots: slots.to_vec(), rows: rows.to_vec(), tables: tables.to_vec() };
        lists.check(SIZE).err().map(|error| error.to_string())
    }

    #[test]
    fn lists_inside_of_the_cache_pass() {
        // What no row sees may be anything.
        assert_eq!(problem(&[19, NO_SLOT, 0], &[[1, 7], [1, 8], [3, 1], [0, 0]], &[99, 4, 0, 2, 77]), None);
        assert_eq!(problem(&[], &[], &[]), None);
    }

    #[test]
    fn what_would_leave_the_cache_is_refused() {
        assert!(problem(&[20], &[], &[]).unwrap().contains("slots"));
        assert!(problem(&[], &[[0, 4], [0, 5]], &[1, 5]).unwrap().contains("pages below 5"));
        assert!(problem(&[], &[[1, 5]], &[1, 2]).unwrap().contains("as long as the context"));
        assert!(problem(&[], &[[u32::MAX, 1]], &[0]).unwrap().contains("as long as the context"));
        // A list that begins again is checked again.
        assert!(problem(&[], &[[0, 8], [1, 4], [0, 12]], &[1, 2, 9]).unwrap().contains("pages below 5"));
    }

    #[test]
    fn a_cache_has_pages_of_tokens_that_slots_can_name() {
        let check = |pages, page_tokens| PagedLists::default().check(PagedSize { pages, page_tokens }).is_ok();
        assert!(check(0, 1) && check(1 << 28, 15));
        assert!(!check(1, 0) && !check(1 << 28, 16) && !check(usize::MAX, 2));
    }
}
