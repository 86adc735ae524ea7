//! The values of settings that are one of a few words: enums that know their spelling in a config file.

use serde::{Deserialize, Serialize};

macro_rules! choices {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum $name { $($(#[$variant_meta])* #[serde(rename = $text)] $variant),+ }

        impl $name {
            /// Every value, as written in a config file.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            /// As written in a config file.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(self.as_str()) }
        }

        impl std::str::FromStr for $name {
            type Err = ();
            fn from_str(text: &str) -> Result<Self, ()> {
                match text { $($text => Ok(Self::$variant),)+ _ => Err(()) }
            }
        }
    };
}

choices! {
    /// Compute precision.
    Precision {
        /// f32.
        No = "no",
        /// bfloat16 with f32 accumulation.
        Bf16 = "bf16",
        /// float16 with f32 accumulation, an f32 residual stream and dynamic loss scaling.
        Fp16 = "fp16",
    }
}
choices! {
    /// Storage type of unquantised base weights.
    WeightDtype {
        /// As stored in the file.
        Auto = "auto",
        /// 32-bit float.
        Float32 = "float32",
        /// Brain float.
        Bfloat16 = "bfloat16",
        /// IEEE half.
        Float16 = "float16",
    }
}
choices! {
    /// 4-bit code books.
    QuantType {
        /// `NormalFloat` (Dettmers et al., 2305.14314).
        Nf4 = "nf4",
        /// 4-bit float of bitsandbytes.
        Fp4 = "fp4",
    }
}
choices! {
    /// Where state waits while it is not computed with.
    OffloadDevice {
        /// In the GPU's memory.
        None = "none",
        /// In host memory.
        Cpu = "cpu",
        /// In files of a folder.
        Nvme = "nvme",
    }
}
choices! {
    /// How examples are packed.
    PackingStrategy {
        /// Best fit decreasing; what is too long is cut.
        Bfd = "bfd",
        /// Best fit decreasing; what is too long is split and all pieces kept.
        BfdSplit = "bfd_split",
        /// Concatenate and cut every `max_length` tokens; boundaries are lost.
        Wrapped = "wrapped",
    }
}
choices! {
    /// What is kept of an example that is too long.
    TruncationMode {
        /// Its start.
        KeepStart = "keep_start",
        /// Its end.
        KeepEnd = "keep_end",
    }
}
choices! {
    /// SFT losses.
    SftLossType {
        /// Cross-entropy.
        Nll = "nll",
        /// TRL's name for cross-entropy computed head-chunk by head-chunk, which is how it is always computed here.
        ChunkedNll = "chunked_nll",
        /// Dynamic fine-tuning (2508.05629): cross-entropy weighted by the token's own probability.
        Dft = "dft",
    }
}
choices! {
    /// Policy losses.
    GrpoLossType {
        /// DeepSeekMath 2402.03300.
        Grpo = "grpo",
        /// Normalised by the micro-batch's tokens.
        Bnpo = "bnpo",
        /// 2503.20783.
        DrGrpo = "dr_grpo",
        /// 2503.14476.
        Dapo = "dapo",
        /// MiniMax-M1 2506.13585.
        Cispo = "cispo",
        /// Soft adaptive policy optimisation.
        Sapo = "sapo",
        /// Length-unbiased sequence policy optimisation.
        Luspo = "luspo",
        /// Variational sequence-level soft policy optimisation.
        Vespo = "vespo",
    }
}
choices! {
    /// Level of the importance ratio.
    ImportanceSamplingLevel {
        /// One ratio per token.
        Token = "token",
        /// One ratio per sequence (GSPO, 2507.18071).
        Sequence = "sequence",
    }
}
choices! {
    /// How much protection the code of completions needs to be run.
    CodeSandbox {
        /// Files, network and processes of the machine are out of reach, or nothing is run.
        Required = "required",
        /// What the machine offers; what it does not is said.
        BestEffort = "best_effort",
    }
}
choices! {
    /// How `cf_code` turns passed tests into a score.
    CodeScoring {
        /// 1 if all pass, else 0.
        PassFail = "pass_fail",
        /// The share that passes.
        Partial = "partial",
        /// The first plus a tenth of the second.
        WeightedSum = "weighted_sum",
    }
}
choices! {
    /// How rewards are scaled into advantages.
    ScaleRewards {
        /// By the standard deviation of the group.
        Group = "group",
        /// By the standard deviation of the generation batch.
        Batch = "batch",
        /// Not at all (Dr. GRPO).
        None = "none",
    }
}
choices! {
    /// How several rewards become one advantage.
    RewardAggregation {
        /// Weighted sum first, then group normalisation.
        SumThenNormalize = "sum_then_normalize",
        /// Group normalisation per reward, then the weighted sum (GDPO).
        NormalizeThenSum = "normalize_then_sum",
    }
}
choices! {
    /// Corrections of the rollout-trainer mismatch.
    RolloutCorrectionMode {
        /// Per token, clamped.
        TokenTruncate = "token_truncate",
        /// Per token, masked outside the bounds.
        TokenMask = "token_mask",
        /// Per sequence, clamped.
        SequenceTruncate = "sequence_truncate",
        /// Per sequence, masked outside the bounds.
        SequenceMask = "sequence_mask",
    }
}
choices! {
    /// Learning-rate schedules, by transformers' names.
    LrSchedulerType {
        /// Linear to zero.
        Linear = "linear",
        /// Half a cosine to zero.
        Cosine = "cosine",
        /// Cosine with hard restarts.
        CosineWithRestarts = "cosine_with_restarts",
        /// Polynomial decay.
        Polynomial = "polynomial",
        /// Constant, no warm-up.
        Constant = "constant",
        /// Constant after warm-up.
        ConstantWithWarmup = "constant_with_warmup",
        /// Inverse square root.
        InverseSqrt = "inverse_sqrt",
        /// Cosine to a minimum.
        CosineWithMinLr = "cosine_with_min_lr",
        /// Cosine to a minimum, with a warm-up that starts from a rate.
        CosineWarmupWithMinLr = "cosine_warmup_with_min_lr",
        /// Warm-up, plateau, decay.
        WarmupStableDecay = "warmup_stable_decay",
    }
}
choices! {
    /// Metric sinks.
    ReportTo {
        /// Only metrics.jsonl.
        None = "none",
        /// TensorBoard event files.
        Tensorboard = "tensorboard",
    }
}
