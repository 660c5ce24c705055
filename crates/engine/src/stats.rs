use crate::histogram::Distributions;
use crate::{Receipt, Tier};

/// What one engine counts since its start, and what it holds now.
#[derive(Clone, Debug, Default)]
pub struct EngineStats {
    pub running: usize,
    pub waiting: usize,
    /// Turns whose pages are being read from disk, and how fast that goes: bytes per second, 0 before any was read.
    pub paging_in: usize,
    pub disk_bytes_per_second: f64,
    /// Turns whose pages others needed, and how often that happened.
    pub paused: usize,
    pub pauses: u64,
    pub steps: u64,
    /// Rows computed that were not sampled by the turn they belong to.
    pub prompt_tokens_computed: u64,
    pub output_tokens: u64,
    /// Guessed tokens that were computed, and those of them that were then sampled.
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
    pub restored_tokens: u64,
    /// Tokens computed although an earlier computation had covered them.
    pub recomputed_tokens: u64,
    pub restored_bytes_read: u64,
    /// Turns, and their restored tokens, by where their KV came from: `none`, `ram`, `disk`, `device`.
    pub tiers: [TierCounts; 4],
    pub commits: u64,
    pub commit_failures: u64,
    pub kv: dormouse_kv::Stats,
    pub distributions: Distributions,
}

/// Of the turns whose KV came from one tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierCounts {
    pub turns: u64,
    pub tokens: u64,
}

impl Tier {
    /// As declared, and as [`EngineStats::tiers`] has them.
    pub const ALL: [Tier; 4] = [Tier::None, Tier::Ram, Tier::Disk, Tier::Device];

    pub fn name(self) -> &'static str {
        match self {
            Tier::None => "none",
            Tier::Ram => "ram",
            Tier::Disk => "disk",
            Tier::Device => "device",
        }
    }
}

impl EngineStats {
    /// A turn left the queue.
    pub(crate) fn admitted(&mut self, receipt: &Receipt) {
        self.distributions.queue_seconds.observe(receipt.queue_ms / 1e3);
        self.tier(receipt.tier).turns += 1;
        self.restored_later(receipt, receipt.restored_tokens);
    }

    /// A turn has so many tokens' KV that need not be computed.
    pub(crate) fn restored_later(&mut self, receipt: &Receipt, tokens: usize) {
        self.restored_tokens += tokens as u64;
        self.tier(receipt.tier).tokens += tokens as u64;
    }

    fn tier(&mut self, tier: Tier) -> &mut TierCounts {
        &mut self.tiers[tier as usize]
    }
}
