//! Where a run computes and in which types.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use candle_core::Device;

use super::Context;
use super::estimate::{context_bytes, saves_memory};
use crate::config::settings::{DeviceChoice, Precision, RankBackend, RankSettings, TrainingSettings};
use crate::device::{self, Footprint};
use crate::engine::Types;
use crate::ranks::device::{RankDevice, local_device};
use crate::ranks::{Exchange, Ranks};

/// A device and the types of the passes on it.
#[derive(Clone, Debug)]
pub struct Backend {
    /// Where blocks compute.
    pub device: Device,
    /// Types of activations and of the residual stream.
    pub types: Types,
}

impl Backend {
    /// The CPU, which computes in f32.
    pub fn cpu() -> Self {
        Self { device: Device::Cpu, types: Types::F32 }
    }

    /// Opens the device that the settings name, on every rank; `auto` takes the GPU with the number of this rank on its machine
    /// where the program was built for GPUs and there are some, else the CPU.
    ///
    /// # Errors
    /// If a GPU is asked for that is not there, a rank has none or that of another one, or a precision that it does not have.
    pub(super) fn of_rank(settings: &TrainingSettings, context: &Context<'_>) -> anyhow::Result<Self> {
        let (ranks, local_rank, gpus) = (&*context.ranks, context.local_rank, visible_gpus());
        let may_share = settings.ranks.backend.may_share_gpus();
        if let Some(value) = hidden_by(context.visible_devices.as_deref(), gpus)
            && settings.device == DeviceChoice::Auto
        {
            tracing::warn!(
                "`CUDA_VISIBLE_DEVICES={value}` names no GPU that the driver knows, so this run is on the CPU; `unset \
                 CUDA_VISIBLE_DEVICES` before the start where the scheduler limits what is visible anyway, or set `device: cpu`"
            );
        }
        let choice = match settings.device {
            DeviceChoice::Auto if gpus > 1 && may_share => DeviceChoice::Cuda(local_rank % gpus),
            DeviceChoice::Auto if gpus > 1 => DeviceChoice::Cuda(local_device(local_rank, local_rank + 1, gpus)?),
            choice => choice,
        };
        let opened = Self::open(choice, settings.precision)?;
        if let Some(bytes) = settings.device_memory_limit {
            opened.limit_memory(bytes, context_bytes(&settings.ranks))?;
        }
        if ranks.world_size() > 1 {
            let ordinal = if let DeviceChoice::Cuda(ordinal) = choice { ordinal } else { 0 };
            let visible_devices = context.visible_devices.clone();
            opened.introduce(ranks, (local_rank, ordinal), visible_devices, may_share)?;
        }
        Ok(opened)
    }

    /// As [`Self::open`] for one rank of several, each with the GPU of its number on its machine.
    ///
    /// # Errors
    /// As [`Self::open`], or if two ranks have one GPU and may not.
    pub fn for_bench(
        choice: DeviceChoice,
        precision: Precision,
        backend: RankBackend,
        (ranks, local_rank): (&dyn Ranks, usize),
    ) -> anyhow::Result<Self> {
        let (gpus, may_share) = (visible_gpus(), backend.may_share_gpus());
        let ordinal = match choice {
            DeviceChoice::Auto if gpus > 0 && may_share => local_rank % gpus,
            DeviceChoice::Auto if gpus > 0 => local_device(local_rank, local_rank + 1, gpus)?,
            _ => 0,
        };
        let choice = if choice == DeviceChoice::Auto && gpus > 0 { DeviceChoice::Cuda(ordinal) } else { choice };
        let opened = Self::open(choice, precision)?;
        if ranks.world_size() > 1 {
            opened.introduce(ranks, (local_rank, ordinal), None, may_share)?;
        }
        Ok(opened)
    }

    /// Limits what this process takes of a GPU's memory, before anything is there, of which `beside` bytes are not for tensors.
    ///
    /// # Errors
    /// If the limit leaves nothing for tensors.
    pub fn limit_memory(&self, bytes: u64, beside: u64) -> anyhow::Result<()> {
        if self.device.is_cpu() {
            tracing::warn!("`device_memory_limit` is for GPUs, and this run computes on the CPU");
            return Ok(());
        }
        device::limit_memory(&self.device, bytes, beside).context("`device_memory_limit` cannot be kept")
    }

    /// Tells every rank of this one's device, and checks that they have what they may.
    pub(super) fn introduce(
        &self,
        ranks: &dyn Ranks,
        (local_rank, ordinal): (usize, usize),
        visible_devices: Option<String>,
        may_share: bool,
    ) -> anyhow::Result<()> {
        let uuid = if self.device.is_cuda() { device::device_uuid(&self.device)? } else { String::new() };
        let (rank, host) = (ranks.rank(), crate::ranks::host_name());
        let own = RankDevice { rank, host, local_rank, ordinal, uuid, visible_devices };
        crate::ranks::device::exchange(ranks, &own, may_share)?;
        Ok(())
    }

    /// What ranks with a GPU each exchange its memory with; `None`: what they exchange goes through host memory. Every rank must
    /// call it.
    ///
    /// # Errors
    /// If NCCL is asked for and the program was built without, or the GPUs do not find each other.
    pub fn exchange(
        &self,
        ranks: &Arc<dyn Ranks>,
        settings: &RankSettings,
    ) -> anyhow::Result<Option<Arc<Mutex<dyn Exchange>>>> {
        let is_wanted = match settings.backend {
            RankBackend::Gloo => false,
            RankBackend::Auto => ranks.world_size() > 1,
            RankBackend::Nccl => true,
        };
        if !is_wanted || !self.device.is_cuda() {
            return Ok(None);
        }
        if !crate::ranks::HAS_NCCL && settings.backend == RankBackend::Auto {
            tracing::warn!(
                "this program was built without NCCL: what the GPUs of {} ranks exchange goes through host memory; build it \
                 with `--features cuda,nccl`",
                ranks.world_size()
            );
            return Ok(None);
        }
        let (main, deadline) = (device::Queue::of(&self.device)?, Duration::from_secs(settings.timeout_secs));
        Ok(Some(crate::ranks::between_gpus(ranks.clone(), &main, (deadline, saves_memory(settings)))?))
    }

    /// Opens the device that the settings name; `auto` takes the first GPU where the program was built for GPUs and there is
    /// one, else the CPU.
    ///
    /// # Errors
    /// If a GPU is asked for that is not there, or a precision that it does not have.
    pub fn open(choice: DeviceChoice, precision: Precision) -> anyhow::Result<Self> {
        match choice {
            DeviceChoice::Cpu => Ok(Self::on_cpu(precision)),
            DeviceChoice::Auto if !has_gpu(0) => Ok(Self::on_cpu(precision)),
            DeviceChoice::Auto => Self::on_gpu(0, precision),
            DeviceChoice::Cuda(ordinal) if has_gpu(ordinal) => Self::on_gpu(ordinal, precision),
            DeviceChoice::Cuda(ordinal) if device::IS_BUILT_FOR_GPUS => bail!(
                "`device: cuda:{ordinal}` was asked for, but there is no such GPU here (`CUDA_VISIBLE_DEVICES` and the \
                 driver decide what is seen); set `device: auto` or leave it out"
            ),
            DeviceChoice::Cuda(ordinal) => bail!(
                "`device: cuda:{ordinal}` was asked for, but this program was built without GPUs; build it with \
                 `--features cuda`, or set `device: cpu`"
            ),
        }
    }

    fn on_cpu(precision: Precision) -> Self {
        if precision == Precision::Fp16 {
            tracing::warn!("`fp16: true`: the CPU computes in f32, which needs no loss scaling");
        }
        if precision == Precision::Bf16 {
            tracing::warn!("`bf16: true`: the CPU computes in f32");
        }
        Self::cpu()
    }

    fn on_gpu(ordinal: usize, precision: Precision) -> anyhow::Result<Self> {
        let types = match precision {
            Precision::No => Types::F32,
            Precision::Fp16 => Types::F16,
            Precision::Bf16 if device::has_bf16(ordinal) => Types::BF16,
            Precision::Bf16 => bail!("`bf16: true`, but GPU {ordinal} has no bfloat16; set `fp16: true` instead"),
        };
        let device = device::open(ordinal).with_context(|| format!("cannot open GPU {ordinal}"))?;
        Ok(Self { device, types })
    }

    /// What holds the memory of a GPU; `None` on the CPU.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn memory(&self) -> anyhow::Result<Option<Footprint>> {
        if self.device.is_cuda() {
            return Ok(Some(device::footprint(&self.device)?));
        }
        Ok(None)
    }

    /// The device and the types, for the opening of a run.
    pub fn describe(&self) -> String {
        if self.device.is_cpu() {
            return format!("CPU, {} threads, f32", rayon::current_num_threads());
        }
        let residual = if self.types.residual == self.types.compute {
            String::new()
        } else {
            format!(", residual stream {}", self.types.residual.as_str())
        };
        format!("{}, {}{residual}", name_of(&self.device), self.types.compute.as_str())
    }

    /// Whether gradients need loss scaling.
    pub fn needs_loss_scaling(&self) -> bool {
        self.types.compute == candle_core::DType::F16
    }
}

/// Whether the program was built for GPUs and this one is there.
pub fn has_gpu(ordinal: usize) -> bool {
    device::is_cuda_device(ordinal)
}

/// The value of `CUDA_VISIBLE_DEVICES` that leaves a program for GPUs without one, such as a scheduler's own numbers.
fn hidden_by(value: Option<&str>, gpus: usize) -> Option<&str> {
    value.filter(|value| device::IS_BUILT_FOR_GPUS && gpus == 0 && !value.trim().is_empty())
}

/// GPUs that this process sees; none where the program was built without.
pub fn visible_gpus() -> usize {
    /// More than a machine has.
    const MOST: usize = 1024;
    (0..MOST).take_while(|&ordinal| has_gpu(ordinal)).count()
}

/// Whether the GPU that `auto` takes computes in bfloat16.
pub fn has_bf16() -> bool {
    has_gpu(0) && device::has_bf16(0)
}

fn name_of(device: &Device) -> String {
    device::device_name(device).unwrap_or_else(|_| format!("{:?}", device.location()))
}
