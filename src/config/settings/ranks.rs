//! The ranks of a run, and how they share its state.

/// The processes (ranks) of a run, and how they share its state (ZeRO; Rajbhandari et al., 1910.02054).
#[derive(Clone, Debug, PartialEq)]
pub struct RankSettings {
    /// Ranks of the run.
    pub world_size: usize,
    /// What of the state is shared instead of held by every rank.
    pub stage: ZeroStage,
    /// Stage 3: parameters of at most so many values are held by every rank all the same.
    pub param_persistence_threshold: usize,
    /// Seconds that a rank waits for another before the job ends.
    pub timeout_secs: u64,
    /// Whether ranks may have the same GPU: what they exchange goes through host memory.
    pub may_share_gpus: bool,
}

impl Default for RankSettings {
    /// One rank, and the defaults of DeepSpeed and torch.
    fn default() -> Self {
        Self {
            world_size: 1,
            stage: ZeroStage::Replicated,
            param_persistence_threshold: 100_000,
            timeout_secs: 1800,
            may_share_gpus: false,
        }
    }
}

/// What of a run's state is cut into shards, one for each rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ZeroStage {
    /// Stage 0, data parallelism: every rank holds everything.
    #[default]
    Replicated,
    /// Stage 1: the optimizer's state.
    Optimizer,
    /// Stage 2: gradients as well.
    Gradients,
    /// Stage 3: parameters as well, those that are trained and those that are not.
    Parameters,
}

impl ZeroStage {
    /// DeepSpeed's number of it.
    pub fn number(self) -> u8 {
        self as u8
    }
}
