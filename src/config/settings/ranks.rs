//! The ranks of a run, and how they share its state.

use std::path::PathBuf;

use super::OffloadDevice;

/// The processes (ranks) of a run, and how they share its state (ZeRO; Rajbhandari et al., 1910.02054).
#[derive(Clone, Debug, PartialEq)]
pub struct RankSettings {
    /// Ranks of the run.
    pub world_size: usize,
    /// What of the state is shared instead of held by every rank.
    pub stage: ZeroStage,
    /// Whether the stage is the first with which the run fits its devices, instead of `stage`.
    pub is_stage_auto: bool,
    /// Stage 3: parameters of at most so many values are held by every rank all the same.
    pub param_persistence_threshold: usize,
    /// Seconds that a rank waits for another before the job ends.
    pub timeout_secs: u64,
    /// What ranks speak with about what lies in the memory of GPUs.
    pub backend: RankBackend,
    /// What waits in host memory beside a GPU, or in files.
    pub offload: OffloadSettings,
}

/// What waits in host memory beside a GPU (ZeRO-Offload; Ren et al., 2101.06840), or in files (ZeRO-Infinity; Rajbhandari et al.,
/// 2104.07857).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OffloadSettings {
    /// The optimizer's state, gradients and the f32 values that it moves; the optimizer works there.
    pub optimizer: OffloadDevice,
    /// Parameters, which come block by block.
    pub params: OffloadDevice,
    /// Whether that memory is page-locked.
    pub pin_memory: bool,
    /// Values of parameters that may be on the GPU at a time; two blocks always may. `None`: two blocks.
    pub max_live_parameters: Option<usize>,
    /// The folder of the optimizer's files, where they are asked for.
    pub optimizer_path: Option<PathBuf>,
    /// The folder of the parameters' files, where they are asked for.
    pub params_path: Option<PathBuf>,
    /// Blocks of which something may be on its way from or to files at a time, with the one that is used.
    pub buffer_count: usize,
}

impl Default for OffloadSettings {
    /// Nothing waits.
    fn default() -> Self {
        Self {
            optimizer: OffloadDevice::None,
            params: OffloadDevice::None,
            pin_memory: true,
            max_live_parameters: None,
            optimizer_path: None,
            params_path: None,
            buffer_count: 3,
        }
    }
}

impl Default for RankSettings {
    /// One rank, and the defaults of DeepSpeed and torch.
    fn default() -> Self {
        Self {
            world_size: 1,
            stage: ZeroStage::Replicated,
            is_stage_auto: false,
            param_persistence_threshold: 100_000,
            timeout_secs: 1800,
            backend: RankBackend::Auto,
            offload: OffloadSettings::default(),
        }
    }
}

/// What ranks exchange the memory of GPUs with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RankBackend {
    /// NCCL where each has a GPU and the program was built for it, else host memory.
    #[default]
    Auto,
    /// Host memory: ranks may have the same GPU.
    Gloo,
    /// NCCL, with one rank too.
    Nccl,
}

impl RankBackend {
    /// Whether ranks may have the same GPU.
    pub fn may_share_gpus(self) -> bool {
        self == Self::Gloo
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
    /// The stage of that number.
    pub fn of_number(number: usize) -> Option<Self> {
        [Self::Replicated, Self::Optimizer, Self::Gradients, Self::Parameters].get(number).copied()
    }

    /// DeepSpeed's number of it.
    pub fn number(self) -> u8 {
        self as u8
    }
}
