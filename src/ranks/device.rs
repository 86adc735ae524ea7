//! Which GPU a rank has, and that no two ranks have the same one.
//!
//! Pure functions over what the environment says and what the driver lists. The order at start is: [`VisibleDevices`]
//! from `CUDA_VISIBLE_DEVICES`, [`resolve`] against the GPUs of the node (this is where Slurm's global ids are
//! understood), [`local_device`] for the rank's ordinal, then [`exchange`] of UUIDs before any GPU collective starts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Ranks;

/// What is wrong with the devices of a run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Two ranks have one GPU.
    #[error(
        "duplicate GPU detected: rank {} (host {}, local rank {}) and rank {} (host {}, local rank {}) are both on GPU {}{}; {}",
        first.rank, first.host, first.local_rank, second.rank, second.host, second.local_rank, first.uuid,
        visible(first, second), advice(first, second)
    )]
    Duplicate {
        /// The lower rank.
        first: Box<RankDevice>,
        /// The higher rank.
        second: Box<RankDevice>,
    },
    /// More ranks than GPUs on a node.
    #[error(
        "{ranks} ranks on this node but {gpus} visible GPU{}: rank with local rank {local_rank} has none; \
         ask for more GPUs (Slurm: `--gres=gpu:{ranks}`) or start fewer ranks (`num_processes: {gpus}`)",
        if *gpus == 1 { "" } else { "s" }
    )]
    TooFew {
        /// Ranks on the node.
        ranks: usize,
        /// GPUs that are visible.
        gpus: usize,
        /// The first rank without a GPU.
        local_rank: usize,
    },
    /// `CUDA_VISIBLE_DEVICES` hides every GPU.
    #[error("CUDA_VISIBLE_DEVICES=`{value}` hides every GPU; unset it, or set `device: cpu` to compute without one")]
    Hidden {
        /// The value.
        value: String,
    },
    /// `CUDA_VISIBLE_DEVICES` cannot be understood.
    #[error("CUDA_VISIBLE_DEVICES=`{value}`: {problem}; {fix}")]
    Unclear {
        /// The value.
        value: String,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        fix: &'static str,
    },
    /// Some ranks have a GPU and others none.
    #[error(
        "rank {} (host {}) computes on the CPU, rank {} (host {}) on a GPU; give every rank a GPU, or set `device: cpu` for all",
        cpu.rank, cpu.host, gpu.rank, gpu.host
    )]
    Mixed {
        /// The first rank without.
        cpu: Box<RankDevice>,
        /// The first rank with one.
        gpu: Box<RankDevice>,
    },
    /// The exchange between ranks failed.
    #[error("{0}")]
    Exchange(#[source] super::Error),
}

impl From<super::Error> for Error {
    fn from(error: super::Error) -> Self {
        Self::Exchange(error)
    }
}

const UNSET: &str = "run `unset CUDA_VISIBLE_DEVICES` before the launch: Slurm's cgroup already limits what is visible";

fn visible(first: &RankDevice, second: &RankDevice) -> String {
    match (&first.visible_devices, &second.visible_devices) {
        (None, None) => String::new(),
        (left, right) if left == right => format!(" (CUDA_VISIBLE_DEVICES=`{}`)", left.as_deref().unwrap_or_default()),
        (left, right) => {
            let show = |value: &Option<String>| value.as_ref().map_or("unset".into(), |v| format!("`{v}`"));
            format!(" (CUDA_VISIBLE_DEVICES {} and {})", show(left), show(right))
        }
    }
}

fn advice(first: &RankDevice, second: &RankDevice) -> &'static str {
    if first.host != second.host {
        "one GPU cannot be on two hosts: give each host its own name, or check for cloned machines"
    } else if first.local_rank == second.local_rank {
        "both have the same local rank: two launchers started ranks on one node; start the run once"
    } else {
        "start the ranks with all GPUs of the node visible (Slurm: `--gres=gpu:N` for the job and `srun` without \
         `--gpus-per-task`/`--gpu-bind`), or `unset CUDA_VISIBLE_DEVICES` so that each rank takes its own"
    }
}

/// What `CUDA_VISIBLE_DEVICES` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VisibleDevices {
    /// Not set: every GPU of the node.
    All,
    /// Set to nothing, or to `-1` in front: no GPU.
    None,
    /// These, in this order.
    List(Vec<DeviceName>),
}

/// One entry of `CUDA_VISIBLE_DEVICES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceName {
    /// An index: the driver's, or a scheduler's own number.
    Index(u64),
    /// `GPU-...`: a UUID or the beginning of one.
    Uuid(String),
    /// `MIG-...`: a slice of a GPU.
    Mig(String),
}

impl VisibleDevices {
    /// Reads the variable; `None` where it is not set.
    ///
    /// As the driver does, the list ends at the first `-1`. Unlike the driver, which silently ends the list there too,
    /// anything else that is not a device is an error.
    ///
    /// # Errors
    /// If an entry is not a device, or one is named twice (the driver then shows no GPU at all).
    pub fn parse(value: Option<&str>) -> Result<Self, Error> {
        let Some(value) = value else { return Ok(Self::All) };
        if value.trim().is_empty() || value.trim() == "NoDevFiles" {
            return Ok(Self::None);
        }
        let unclear = |problem, fix| Error::Unclear { value: value.into(), problem, fix };
        let mut names = Vec::new();
        for entry in value.split(',').map(str::trim) {
            let name = if entry == "-1" {
                break;
            } else if entry.starts_with("GPU-") {
                DeviceName::Uuid(entry.into())
            } else if entry.starts_with("MIG-") {
                DeviceName::Mig(entry.into())
            } else if let Ok(index) = entry.parse() {
                DeviceName::Index(index)
            } else {
                let problem = format!("`{entry}` is neither an index nor a UUID (`GPU-...`, `MIG-...`)");
                return Err(unclear(problem, "write e.g. `0,1`, or unset it"));
            };
            if names.contains(&name) {
                let problem = format!("`{entry}` is named twice, and the driver then shows no GPU at all");
                return Err(unclear(problem, "name each GPU once"));
            }
            names.push(name);
        }
        Ok(if names.is_empty() { Self::None } else { Self::List(names) })
    }
}

/// One GPU of the node as the driver lists it without `CUDA_VISIBLE_DEVICES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// The driver's index.
    pub index: usize,
    /// Its UUID, `GPU-...`.
    pub uuid: String,
}

/// The GPUs that a process may use, and the value of `CUDA_VISIBLE_DEVICES` that shows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// Positions in the list of the node's GPUs, in the order of the ordinals. For MIG slices, which that list does not
    /// have, just the ordinals.
    pub gpus: Vec<usize>,
    /// What to set `CUDA_VISIBLE_DEVICES` to before CUDA starts; `None` where it is right as it is.
    pub corrected: Option<String>,
    /// What was corrected and why, for the log.
    pub note: Option<String>,
}

/// Finds the GPUs that `CUDA_VISIBLE_DEVICES` means among `gpus`, those the node's driver lists.
///
/// Some clusters fill the variable with ids of their own that are unique over the cluster (`21000,21001`), which CUDA
/// takes for indices that do not exist, so that every rank ends on the same GPU or on none. Such a list is understood
/// if Slurm says elsewhere which indices it granted (`SLURM_STEP_GPUS`, `SLURM_JOB_GPUS`, `GPU_DEVICE_ORDINAL`), or if
/// the node shows exactly as many GPUs as there are ids (a cgroup hides the rest).
///
/// # Errors
/// If nothing is visible, or the list cannot be matched with the node's GPUs.
pub fn resolve(environment: &BTreeMap<String, String>, gpus: &[Gpu]) -> Result<Resolution, Error> {
    let value = environment.get("CUDA_VISIBLE_DEVICES").map(String::as_str);
    let as_it_is = |gpus| Resolution { gpus, corrected: None, note: None };
    let names = match VisibleDevices::parse(value)? {
        VisibleDevices::All => return Ok(as_it_is((0..gpus.len()).collect())),
        VisibleDevices::None => return Err(Error::Hidden { value: value.unwrap_or_default().into() }),
        VisibleDevices::List(names) => names,
    };
    let value = value.unwrap_or_default();
    let unclear = |problem, fix| Error::Unclear { value: value.into(), problem, fix };
    let mut found = Vec::new();
    let mut unknown = Vec::new();
    for name in &names {
        match name {
            // Slices are found by the driver; there is nothing to match them with here.
            DeviceName::Mig(_) => found.push(found.len()),
            DeviceName::Index(index) => match gpus.iter().position(|gpu| gpu.index as u64 == *index) {
                Some(position) => found.push(position),
                None => unknown.push(*index),
            },
            DeviceName::Uuid(uuid) => {
                let mut matches = (0..gpus.len()).filter(|&g| gpus[g].uuid.starts_with(uuid.as_str()));
                match (matches.next(), matches.next()) {
                    (Some(position), None) => found.push(position),
                    (None, _) => {
                        let problem = format!("no GPU of this node has the UUID `{uuid}`");
                        return Err(unclear(problem, "compare with `nvidia-smi -L` on this node"));
                    }
                    (Some(_), Some(_)) => {
                        let problem = format!("`{uuid}` fits more than one GPU");
                        return Err(unclear(problem, "write the whole UUID"));
                    }
                }
            }
        }
    }
    if let Some(at) = (1..found.len()).find(|&at| found[..at].contains(&found[at])) {
        let problem = format!("entry {at} (counted from 0) names a GPU that is named before");
        return Err(unclear(problem, "name each GPU once"));
    }
    if unknown.is_empty() {
        return Ok(as_it_is(found));
    }
    if !found.is_empty() {
        let problem = format!("index {} does not exist, the node has {} GPUs", unknown[0], gpus.len());
        return Err(unclear(problem, UNSET));
    }
    if let Some((variable, granted)) = granted(environment, gpus, names.len()) {
        let note = format!("CUDA_VISIBLE_DEVICES=`{value}` holds ids of the scheduler; took {variable} instead");
        return Ok(Resolution { corrected: Some(indices(&granted, gpus)), gpus: granted, note: Some(note) });
    }
    if names.len() == gpus.len() {
        let all: Vec<usize> = (0..gpus.len()).collect();
        let note = format!(
            "CUDA_VISIBLE_DEVICES=`{value}` holds ids of the scheduler; the node shows as many GPUs, took them in order"
        );
        return Ok(Resolution { corrected: Some(indices(&all, gpus)), gpus: all, note: Some(note) });
    }
    let problem = format!(
        "these are not indices of this node's {} GPU(s) but ids of the scheduler, and Slurm does not say which GPUs \
         they are",
        gpus.len()
    );
    Err(unclear(problem, UNSET))
}

fn indices(positions: &[usize], gpus: &[Gpu]) -> String {
    positions.iter().map(|&p| gpus[p].index.to_string()).collect::<Vec<_>>().join(",")
}

/// The GPUs that Slurm granted, from the first variable that names `count` existing ones.
fn granted(environment: &BTreeMap<String, String>, gpus: &[Gpu], count: usize) -> Option<(&'static str, Vec<usize>)> {
    ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "GPU_DEVICE_ORDINAL"].into_iter().find_map(|variable| {
        let positions: Vec<usize> = environment
            .get(variable)?
            .split(',')
            .map(|entry| {
                let index: usize = entry.trim().parse().ok()?;
                gpus.iter().position(|gpu| gpu.index == index)
            })
            .collect::<Option<_>>()?;
        let is_distinct = (1..positions.len()).all(|at| !positions[..at].contains(&positions[at]));
        (positions.len() == count && is_distinct).then_some((variable, positions))
    })
}

/// The ordinal of a rank's GPU among the visible ones.
///
/// With as many GPUs as ranks on the node, local rank `i` takes GPU `i`. A single visible GPU is taken by every rank: a
/// launcher that binds one GPU to each task shows each its own as number 0, and [`exchange`] finds the case where it
/// does not.
///
/// # Errors
/// If there are fewer GPUs than ranks, otherwise.
pub fn local_device(local_rank: usize, local_world_size: usize, visible_gpus: usize) -> Result<usize, Error> {
    if visible_gpus > local_rank.max(local_world_size.saturating_sub(1)) {
        Ok(local_rank)
    } else if visible_gpus == 1 {
        Ok(0)
    } else {
        let ranks = local_world_size.max(local_rank + 1);
        Err(Error::TooFew { ranks, gpus: visible_gpus, local_rank: visible_gpus })
    }
}

/// A rank and the GPU it took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankDevice {
    /// The rank.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// Its number on the host.
    pub local_rank: usize,
    /// Its GPU's number among the visible ones.
    pub ordinal: usize,
    /// Its GPU's UUID; empty for a rank on the CPU.
    pub uuid: String,
    /// What `CUDA_VISIBLE_DEVICES` was.
    pub visible_devices: Option<String>,
}

/// Checks that no two ranks have the same GPU.
///
/// # Errors
/// If two have, naming the first such pair, their hosts and the fix.
pub fn check_duplicates(devices: &[RankDevice]) -> Result<(), Error> {
    let mut owners: BTreeMap<&str, &RankDevice> = BTreeMap::new();
    let mut in_order: Vec<&RankDevice> = devices.iter().collect();
    in_order.sort_by_key(|device| device.rank);
    for device in in_order.into_iter().filter(|device| !device.uuid.is_empty()) {
        if let Some(first) = owners.insert(&device.uuid, device) {
            return Err(Error::Duplicate { first: Box::new(first.clone()), second: Box::new(device.clone()) });
        }
    }
    Ok(())
}

/// Tells every rank every rank's GPU and checks that all or none have one, and unless `may_share` that no two are the same. To be
/// called over a CPU transport, before any collective on GPUs starts: those hang or fail obscurely where two ranks share a GPU.
///
/// # Errors
/// If the exchange fails, only some ranks have a GPU, or as [`check_duplicates`], on every rank alike.
pub fn exchange(ranks: &dyn Ranks, own: &RankDevice, may_share: bool) -> Result<Vec<RankDevice>, Error> {
    let unreadable = |peer: usize, problem: serde_json::Error| super::Error::Message {
        peer,
        what: "its GPU",
        problem: problem.to_string(),
    };
    let message = serde_json::to_vec(own).map_err(|problem| unreadable(own.rank, problem))?;
    let all = ranks.all_gather_bytes(&message)?;
    let devices: Vec<RankDevice> = all
        .iter()
        .enumerate()
        .map(|(peer, bytes)| serde_json::from_slice(bytes).map_err(|problem| unreadable(peer, problem)))
        .collect::<Result<_, _>>()?;
    let find = |is_on_cpu: bool| devices.iter().find(|device| device.uuid.is_empty() == is_on_cpu);
    if let (Some(cpu), Some(gpu)) = (find(true), find(false)) {
        return Err(Error::Mixed { cpu: Box::new(cpu.clone()), gpu: Box::new(gpu.clone()) });
    }
    if !may_share {
        check_duplicates(&devices)?;
    }
    Ok(devices)
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
