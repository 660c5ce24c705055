//! Which mapped pages a device has copies of, and in which places of its memory: the bookkeeping of a cache of pages,
//! whatever that memory is.
//!
//! A page's address in the mapping names it. What the device holds of a page are its first positions, with the bytes that the
//! mapping has there: both are written by forward passes, and whoever else writes a mapped page says so ([`Places::forget`]).

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use dormouse_kernels::cpu::attention::Sequence;
use dormouse_kernels::{PAGE_TOKENS, PagePtr};

/// A page that the device holds.
struct Held {
    place: usize,
    /// Its first positions, which are as in the mapping.
    positions: usize,
    last_used: u64,
}

/// A page of which a pass needs what the device lacks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Coming {
    pub page: PagePtr,
    pub place: usize,
    /// The positions that the device has once it is there.
    pub positions: usize,
}

/// A step's pages have no room together; so many have.
#[derive(Debug)]
pub(crate) struct Full(pub usize);

#[derive(Default)]
pub(crate) struct Places {
    free: Vec<usize>,
    held: HashMap<PagePtr, Held>,
    clock: u64,
    /// What the device lacks of the pages of the pass that is being made.
    coming: Vec<Coming>,
}

impl Places {
    pub fn forget(&mut self, pages: &[PagePtr]) {
        for page in pages {
            if let Some(held) = self.held.remove(page) {
                self.free.push(held.place);
            }
        }
    }

    pub fn forget_all(&mut self) {
        self.free.extend(self.held.drain().map(|(_, held)| held.place));
    }

    /// Gives every page of `sequences` a place, and notes what the device lacks of them ([`Places::coming`]). Where no place is
    /// free, `grow` is asked for more; where it has none, the least recently used pages make room. The places of all their
    /// pages, one sequence after the other; of pages that nothing is known of yet, none.
    pub fn place(
        &mut self,
        sequences: &[Sequence<'_>],
        grow: &mut dyn FnMut() -> Range<usize>,
    ) -> Result<Vec<Option<usize>>, Full> {
        self.clock += 1;
        self.coming.clear();
        for page in sequences.iter().flat_map(|sequence| pages_of(sequence)) {
            if let Some(held) = self.held.get_mut(page) {
                held.last_used = self.clock;
            }
        }
        let (mut places, mut coming) = (Vec::new(), HashMap::new());
        for sequence in sequences {
            let used = pages_of(sequence).len();
            for (index, page) in sequence.pages.iter().enumerate() {
                if index >= used {
                    places.push(None);
                    continue;
                }
                let place = self.place_of(*page, grow)?;
                let needed = sequence.start.saturating_sub(index * PAGE_TOKENS).min(PAGE_TOKENS);
                if self.held[page].positions < needed {
                    // Sequences that begin alike share pages, and may need more of one or less.
                    let known = coming.entry(*page).or_insert_with(|| {
                        self.coming.push(Coming { page: *page, place, positions: 0 });
                        self.coming.len() - 1
                    });
                    let positions = &mut self.coming[*known].positions;
                    *positions = needed.max(*positions);
                }
                places.push(Some(place));
            }
        }
        Ok(places)
    }

    fn place_of(&mut self, page: PagePtr, grow: &mut dyn FnMut() -> Range<usize>) -> Result<usize, Full> {
        if let Some(held) = self.held.get(&page) {
            return Ok(held.place);
        }
        let place = self.take_place(grow)?;
        self.held.insert(page, Held { place, positions: 0, last_used: self.clock });
        Ok(place)
    }

    fn take_place(&mut self, grow: &mut dyn FnMut() -> Range<usize>) -> Result<usize, Full> {
        if self.free.is_empty() {
            self.free.extend(grow().rev());
        }
        if let Some(place) = self.free.pop() {
            return Ok(place);
        }
        // The least recently used pages that this pass does not need, several at once, so that they are not looked for
        // again for the next page.
        let others = self.held.iter().filter(|(_, held)| held.last_used < self.clock);
        let mut oldest: Vec<(u64, PagePtr)> = others.map(|(page, held)| (held.last_used, *page)).collect();
        oldest.sort_unstable();
        oldest.truncate((self.held.len() / 16).max(1));
        let pages: Vec<PagePtr> = oldest.into_iter().map(|(_, page)| page).collect();
        self.forget(&pages);
        self.free.pop().ok_or(Full(self.held.len()))
    }

    /// What the device lacks of the pages that were placed.
    pub fn coming(&self) -> &[Coming] {
        &self.coming
    }

    /// After a pass: the device and the mapping hold what was coming, and the rows of `sequences`.
    pub fn wrote(&mut self, sequences: &[Sequence<'_>]) {
        for coming in self.coming.drain(..) {
            self.held.entry(coming.page).and_modify(|held| held.positions = coming.positions);
        }
        for sequence in sequences {
            let end = sequence.start + sequence.rows;
            for (index, page) in pages_of(sequence).iter().enumerate().skip(sequence.start / PAGE_TOKENS) {
                let positions = (end - index * PAGE_TOKENS).min(PAGE_TOKENS);
                self.held.entry(*page).and_modify(|held| held.positions = positions);
            }
        }
    }

    #[cfg(all(test, feature = "cuda"))]
    pub fn of(&self, page: &PagePtr) -> Option<usize> {
        self.held.get(page).map(|held| held.place)
    }
}

/// The pages of all positions up to the last row's.
pub(crate) fn pages_of<'a>(sequence: &Sequence<'a>) -> &'a [PagePtr] {
    &sequence.pages[..(sequence.start + sequence.rows).div_ceil(PAGE_TOKENS)]
}

/// How many of the sequences, from the first on, have room for their pages together among `most`: at least one, whether or
/// not it has.
pub(crate) fn fitting(sequences: &[Sequence<'_>], most: usize) -> usize {
    let mut pages = HashSet::<PagePtr>::new();
    let fits = |sequence: &&Sequence<'_>| {
        pages.extend(pages_of(sequence));
        pages.len() <= most
    };
    sequences.iter().take_while(fits).count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages that nobody reads: only their addresses count.
    fn pages(count: usize) -> (Vec<[u32; 4]>, Vec<PagePtr>) {
        let mut memory = vec![[0; 4]; count];
        // SAFETY: nothing here looks at what the pointers point to.
        let page = |bytes: &mut [u32; 4]| unsafe { PagePtr::new(bytes.as_mut_ptr().cast()) };
        let pages = memory.iter_mut().map(page).collect();
        (memory, pages)
    }

    /// A sequence that computes one more position behind all of these pages but the last position.
    fn whole(pages: &[PagePtr]) -> Sequence<'_> {
        Sequence { pages, first_row: 0, rows: 1, start: pages.len() * PAGE_TOKENS - 1 }
    }

    #[test]
    fn the_least_recently_used_pages_make_room_and_what_a_pass_needs_stays() {
        let (_memory, pages) = pages(4);
        let (mut places, mut room) = (Places::default(), vec![0..2, 2..3]);
        let mut grow = || room.pop().unwrap_or(0..0);
        for one in [0..1, 1..2, 0..1, 2..3] {
            places.place(&[whole(&pages[one.clone()])], &mut grow).unwrap();
            places.wrote(&[whole(&pages[one])]);
        }
        // Three places: the second page is the one that was used longest ago.
        places.place(&[whole(&pages[3..])], &mut grow).unwrap();
        places.wrote(&[whole(&pages[3..])]);
        places.place(&[whole(&pages[..1]), whole(&pages[2..3])], &mut grow).unwrap();
        assert!(places.coming().is_empty());
        places.place(&[whole(&pages[1..2])], &mut grow).unwrap();
        assert_eq!(places.coming().len(), 1);
        assert_eq!(places.place(&[whole(&pages)], &mut grow).unwrap_err().0, 3);
        assert_eq!(fitting(&[whole(&pages[..2]), whole(&pages[1..3]), whole(&pages)], 3), 2);
    }

    #[test]
    fn what_is_coming_is_as_much_of_a_page_as_any_sequence_needs_until_it_was_written() {
        let (_memory, pages) = pages(2);
        let mut places = Places::default();
        let short = Sequence { pages: &pages, first_row: 0, rows: 1, start: 20 };
        let placed = places.place(&[short, whole(&pages), short], &mut || 0..2).unwrap();
        assert_eq!((placed[0], placed[1]), (placed[2], None), "a page behind the last row is not known");
        let coming: Vec<usize> = places.coming().iter().map(|coming| coming.positions).collect();
        assert_eq!(coming, [PAGE_TOKENS, PAGE_TOKENS - 1]);
        // A pass that failed leaves nothing for there; one that ended does.
        places.place(&[whole(&pages)], &mut || 0..0).unwrap();
        assert_eq!(places.coming().len(), 2);
        places.wrote(&[whole(&pages)]);
        places.place(&[whole(&pages)], &mut || 0..0).unwrap();
        assert!(places.coming().is_empty());
        places.forget(&pages[1..]);
        places.place(&[whole(&pages)], &mut || 0..0).unwrap();
        assert_eq!(places.coming().len(), 1);
    }
}
