//! Text to fill a prompt with: the same at every run, and as hard to compress as plain English.

const WORDS: [&str; 48] = [
    "the",
    "river",
    "a",
    "small",
    "town",
    "of",
    "winter",
    "and",
    "her",
    "brother",
    "carried",
    "light",
    "in",
    "over",
    "old",
    "garden",
    "to",
    "letter",
    "about",
    "ship",
    "that",
    "never",
    "returned",
    "with",
    "bread",
    "morning",
    "they",
    "walked",
    "slowly",
    "under",
    "stone",
    "bridge",
    "while",
    "music",
    "from",
    "market",
    "square",
    "grew",
    "louder",
    "until",
    "evening",
    "came",
    "again",
    "questions",
    "remained",
    "for",
    "mountain",
    "travellers",
];

/// `count` words in sentences.
pub fn words(count: usize) -> String {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut text = String::new();
    for index in 0..count {
        // A linear congruential generator's high bits are random enough to choose words.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text += WORDS[(state >> 33) as usize % WORDS.len()];
        text += if index % 12 == 11 { ". " } else { " " };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_text_begins_like_a_shorter_one() {
        assert!(words(100).starts_with(&words(30)));
        assert_eq!(words(100).split_whitespace().count(), 100);
    }
}
