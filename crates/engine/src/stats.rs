/// What one engine counts since its start, and what it holds now.
#[derive(Clone, Debug, Default)]
pub struct EngineStats {
    pub running: usize,
    pub waiting: usize,
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
    pub commits: u64,
    pub commit_failures: u64,
    pub kv: dormouse_kv::Stats,
}
