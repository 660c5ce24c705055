//! Prompt lookup: what followed the last time that the log's last tokens occurred (Saxena, 2023).

use dormouse_models::TokenId;

/// Lengths of the n-grams that are looked for, the longest first: where three tokens agree, the next often does.
const LENGTHS: [usize; 2] = [3, 2];
/// How far back a match is followed to tell how long it is.
pub const MATCH_MOST: usize = 16;
/// Slots of a table, as powers of two: a table of the largest takes 1 MiB.
const SLOT_BITS: std::ops::RangeInclusive<u32> = 8..=18;

/// Where each n-gram of a growing log occurred last.
///
/// Like the window of an LZ77 compressor: a fixed table of positions under the hash of an n-gram, newer positions over
/// older ones, and the log itself to tell whether a position is right. A token costs two writes and two reads, however
/// long the log, and nothing is ever searched.
pub struct NgramIndex {
    tables: [Vec<u32>; LENGTHS.len()],
    slot_bits: u32,
    /// Tokens of the log that are the end of an indexed n-gram.
    indexed: usize,
}

/// A place of the log that looks like its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// Position of the token that followed there.
    pub next: usize,
    /// Tokens before it that are equal to the log's last ones, counted up to [`MATCH_MOST`].
    pub length: usize,
}

impl NgramIndex {
    /// `log_most`: the length that the log may reach. Beyond the largest table, places long ago are forgotten.
    pub fn new(log_most: usize) -> NgramIndex {
        let slot_bits = log_most.max(1).ilog2() + 2;
        let slot_bits = slot_bits.clamp(*SLOT_BITS.start(), *SLOT_BITS.end());
        // Zero stands for an empty slot: no n-gram ends before position 2.
        NgramIndex { tables: LENGTHS.map(|_| vec![0; 1 << slot_bits]), slot_bits, indexed: 0 }
    }

    /// The last place before the end of `log` where its last tokens occurred. The log may only grow between calls.
    pub fn find(&mut self, log: &[TokenId]) -> Option<Match> {
        // The n-grams at the log's end have no successor yet, and would find themselves.
        for end in self.indexed + 1..log.len() {
            for (table, n) in self.tables.iter_mut().zip(LENGTHS) {
                if end >= n {
                    table[slot(&log[end - n..end], self.slot_bits)] = end as u32;
                }
            }
        }
        self.indexed = self.indexed.max(log.len().saturating_sub(1));
        self.tables.iter().zip(LENGTHS).find_map(|(table, n)| {
            let gram = &log[log.len().checked_sub(n)?..];
            let next = table[slot(gram, self.slot_bits)] as usize;
            (next >= n && &log[next - n..next] == gram)
                .then(|| Match { next, length: common_end(&log[..next], log) })
        })
    }
}

impl Match {
    /// The token `ahead` places after the log's end, if it goes on as it did here. A match that overlaps the log's end
    /// goes round in its own period.
    pub fn token(&self, log: &[TokenId], ahead: usize) -> TokenId {
        log[self.next + ahead % (log.len() - self.next)]
    }
}

fn common_end(earlier: &[TokenId], log: &[TokenId]) -> usize {
    earlier.iter().rev().zip(log.iter().rev()).take(MATCH_MOST).take_while(|(a, b)| a == b).count()
}

/// Multiplicative hashing (Knuth): the high bits of the product depend on all bits of all tokens.
fn slot(gram: &[TokenId], bits: u32) -> usize {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let mix = |hash: u64, token: &TokenId| (hash.rotate_left(32) ^ u64::from(*token)).wrapping_mul(GOLDEN);
    (gram.iter().fold(0, mix) >> (64 - bits)) as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same by searching: the longest n-gram first, its last occurrence that something follows.
    fn searched(log: &[TokenId]) -> Option<Match> {
        LENGTHS.iter().find_map(|n| {
            let gram = &log[log.len().checked_sub(*n)?..];
            let next = (*n..log.len()).rev().find(|end| &log[end - n..*end] == gram)?;
            Some(Match { next, length: common_end(&log[..next], log) })
        })
    }

    proptest! {
        #[test]
        fn it_finds_what_a_search_finds(
            log in prop::collection::vec(0u32..5, 0..120),
            calls in prop::collection::vec(0usize..120, 0..20),
        ) {
            // So few n-grams share no slot of the largest table (checked below), so nothing is forgotten.
            let mut index = NgramIndex::new(usize::MAX / 2);
            let mut seen = 0;
            for call in calls {
                seen = seen.max(call.min(log.len()));
                prop_assert_eq!(index.find(&log[..seen]), searched(&log[..seen]));
            }
        }

        #[test]
        fn in_a_crowded_table_whatever_it_finds_is_a_match(log in prop::collection::vec(0u32..40, 0..2000)) {
            let mut index = NgramIndex::new(1);
            for end in 0..log.len() {
                let log = &log[..end];
                if let Some(found) = index.find(log) {
                    prop_assert!(found.next < log.len() && found.length >= 2);
                    prop_assert_eq!(&log[found.next - found.length..found.next], &log[log.len() - found.length..]);
                }
            }
        }
    }

    #[test]
    fn the_small_grams_of_the_property_test_share_no_slot() {
        for n in LENGTHS {
            let grams = 5u32.pow(n as u32);
            let gram = |g: u32| (0..n as u32).map(|i| g / 5u32.pow(i) % 5).collect::<Vec<_>>();
            let mut slots: Vec<usize> = (0..grams).map(|g| slot(&gram(g), *SLOT_BITS.end())).collect();
            slots.sort_unstable();
            slots.dedup();
            assert_eq!(slots.len(), grams as usize);
        }
    }

    #[test]
    fn a_repetition_that_reaches_the_end_goes_round() {
        let log = [7, 8, 9, 7, 8, 9, 7, 8];
        let found = NgramIndex::new(8).find(&log).unwrap();
        assert_eq!(found, Match { next: 5, length: 5 });
        let ahead: Vec<TokenId> = (0..7).map(|ahead| found.token(&log, ahead)).collect();
        assert_eq!(ahead, [9, 7, 8, 9, 7, 8, 9]);
    }

    #[test]
    fn the_last_of_several_places_counts_and_three_tokens_before_two() {
        assert_eq!(NgramIndex::new(9).find(&[1, 2, 5, 1, 2, 6, 1, 2]).unwrap().next, 5);
        assert_eq!(NgramIndex::new(9).find(&[9, 1, 2, 5, 3, 1, 2, 6, 9, 1, 2]).unwrap().next, 3);
        assert_eq!(NgramIndex::new(9).find(&[1, 2, 3, 4]), None);
    }
}
