//! Where the state of a run lies: what ranks share of it, which is a stage of ZeRO, and what waits elsewhere.
//!
//! A stage that is left open is the first with which the run fits every rank's device by the estimate of [`estimate`]: fewer
//! things to gather are faster. Offloading is never turned on that was not asked for; where nothing fits without, the error names
//! what would.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::bail;

use super::estimate::{CONTEXT_ALONE, Estimate, Shape, Work, context_bytes};
use super::{Backend, session};
use crate::config::settings::{
    ModelSettings, OffloadDevice, OffloadSettings, RankSettings, TrainingSettings, ZeroStage,
};
use crate::device;
use crate::ranks::{Ranks, host_name};
use crate::telemetry::units;
use crate::zero::{Offload, Sharing, ranks_at};

/// Stages from the one with the least to exchange.
const STAGES: [ZeroStage; 4] =
    [ZeroStage::Replicated, ZeroStage::Optimizer, ZeroStage::Gradients, ZeroStage::Parameters];

/// Memory that a rank may take, the least over all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    /// Of the device that computes; on the CPU that is the host's.
    device: u64,
    /// Of the host's memory beside a GPU.
    host: u64,
    is_on_gpu: bool,
}

/// What a run takes in a stage, with what waits elsewhere.
type Needs<'a> = dyn Fn(ZeroStage, &OffloadSettings) -> Estimate + 'a;

/// What ranks share, what waits elsewhere, and what there is to say of the stage.
pub(super) fn of(
    training: &TrainingSettings,
    model: &ModelSettings,
    work: Work,
    ranks: &Arc<dyn Ranks>,
    backend: &Backend,
) -> anyhow::Result<((Sharing, Offload), Option<String>)> {
    let (settings, note) = settle_stage(training, model, work, &**ranks, backend)?;
    let exchange = backend.exchange(ranks, &settings)?;
    let sharing = Sharing::new(Arc::clone(ranks), exchange, &settings, training.optimizer.kind);
    let run = run_name(&training.output_dir, &**ranks)?;
    Ok(((sharing, Offload::of(&settings, &backend.device, backend.types.read(), &run)), note))
}

/// A name for the files of a run that no other run has; all ranks have the same.
pub(super) fn run_name(output_dir: &Path, ranks: &dyn Ranks) -> anyhow::Result<String> {
    let folder = output_dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let plain: String = folder.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(40).collect();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    let key = blake3::hash(format!("{now} {} {}", std::process::id(), host_name()).as_bytes()).to_hex();
    let mut name = format!("{plain}-{}", &key[..8]).into_bytes();
    ranks.broadcast(&mut name, 0)?;
    Ok(String::from_utf8(name)?)
}

/// The settings with the stage that the run takes, and what there is to say of it.
fn settle_stage(
    training: &TrainingSettings,
    model: &ModelSettings,
    work: Work,
    ranks: &dyn Ranks,
    backend: &Backend,
) -> anyhow::Result<(RankSettings, Option<String>)> {
    let mut settings = training.ranks.clone();
    let is_careful = settings.stage == ZeroStage::Parameters && ranks.world_size() > 1;
    if !settings.is_stage_auto && !is_careful {
        return Ok((settings, None));
    }
    // A limit leaves room for the ranks' exchange already; what a card has free does not.
    let is_limited = training.device_memory_limit.is_some();
    let exchange = if is_limited { 0 } else { context_bytes(&settings) - CONTEXT_ALONE };
    let Some(room) = room(ranks, backend, exchange)? else {
        let note = "auto: 0, for this system does not say how much memory is free";
        return Ok((settings, training.ranks.is_stage_auto.then(|| note.into())));
    };
    let shape = session::model_sizes(model, &mut |_| {})
        .and_then(|(config, stored)| Shape::new(config, &stored, model, backend.types));
    let shape = match shape {
        // A model that cannot be read is an error of its own where it is loaded.
        Err(_) if !settings.is_stage_auto => return Ok((settings, None)),
        shape => shape?,
    };
    let activations = session::activations(training);
    let needs = |stage, offload: &OffloadSettings| {
        let settings = RankSettings { stage, offload: acting(offload, room.is_on_gpu), ..settings.clone() };
        shape.estimate(work, activations, &settings, training.optimizer.kind)
    };
    if !settings.is_stage_auto {
        let note = faster(room, &needs, &settings.offload);
        return Ok((settings, note));
    }
    let (stage, why) = choose(ranks.world_size(), room, &needs, &settings.offload)?;
    settings.stage = stage;
    Ok((settings, Some(why)))
}

/// What of the offloads acts: beside the CPU host memory is no other place.
fn acting(offload: &OffloadSettings, is_on_gpu: bool) -> OffloadSettings {
    let acting = |place| if place == OffloadDevice::Cpu && !is_on_gpu { OffloadDevice::None } else { place };
    OffloadSettings { optimizer: acting(offload.optimizer), params: acting(offload.params), ..offload.clone() }
}

/// The least room of all ranks beside the `exchange` between them on a GPU; ranks of one machine, or GPU, share its memory. `None` where a system does not say it.
fn room(ranks: &dyn Ranks, backend: &Backend, exchange: u64) -> anyhow::Result<Option<Room>> {
    let is_on_gpu = backend.device.is_cuda();
    let uuid = if is_on_gpu { device::device_uuid(&backend.device)? } else { String::new() };
    let (on_host, on_gpu) = (ranks_at(ranks, &host_name())?, ranks_at(ranks, &uuid)?);
    let host = device::free_host_memory().map_or(0, |bytes| bytes / on_host);
    let own = if is_on_gpu {
        [device::free_memory_shared(&backend.device, on_gpu)?.saturating_sub(exchange), host]
    } else {
        [host, host]
    };
    let message: Vec<u8> = own.iter().flat_map(|bytes| bytes.to_le_bytes()).collect();
    let all = ranks.all_gather_bytes(&message)?;
    let least = |place: usize| {
        let of_rank =
            |bytes: &Vec<u8>| bytes.as_chunks::<8>().0.get(place).map_or(0, |bytes| u64::from_le_bytes(*bytes));
        all.iter().map(of_rank).min().unwrap_or(0)
    };
    let room = Room { device: least(0), host: least(1), is_on_gpu };
    Ok((room.device > 0).then_some(room))
}

/// Bytes of the device that computes at the least, for a rollout's cache gives way.
fn needed(estimate: &Estimate, room: Room) -> u64 {
    let tensors = estimate.at_least().tensors();
    tensors + if room.is_on_gpu { 0 } else { estimate.host }
}

fn fits(estimate: &Estimate, room: Room) -> bool {
    needed(estimate, room) <= room.device && (!room.is_on_gpu || room.host == 0 || estimate.host <= room.host)
}

/// The first stage that fits, and why it is that one.
fn choose(
    world_size: usize,
    room: Room,
    needs: &Needs<'_>,
    offload: &OffloadSettings,
) -> anyhow::Result<(ZeroStage, String)> {
    let stages = if world_size > 1 { &STAGES[..] } else { &STAGES[..1] };
    let takes = |stage| units::bytes(needed(&needs(stage, offload), room));
    let free = units::bytes(room.device);
    let is_fit = |stage: &&ZeroStage| fits(&needs(**stage, offload), room);
    if let Some(&stage) = stages.iter().find(is_fit) {
        let taken = takes(stage);
        let why = match stages.iter().take_while(|other| **other < stage).last() {
            None => format!("auto: 0, everything fits on every rank ({taken} of {free} that are free)"),
            Some(before) => format!(
                "auto: {}, the first that fits ({taken} of {free} that are free; stage {} takes {})",
                stage.number(),
                before.number(),
                takes(*before)
            ),
        };
        return Ok((stage, why));
    }
    let last = stages[stages.len() - 1];
    let set = format!("`zero_stage: {}` tries it all the same", last.number());
    let help = match would_fit(stages, room, needs, offload) {
        Some((stage, text)) => {
            format!("with {text} stage {} would fit, which was not asked for; {set}", stage.number())
        }
        None => format!(
            "no offload would be enough: lower `max_length`, `max_completion_length` or `per_device_train_batch_size`; {set}"
        ),
    };
    bail!(
        "`zero_stage: auto` finds no stage that fits: in stage {} a rank takes {} of {} by the estimate, and {free} are free; {help}",
        last.number(),
        takes(last),
        if room.is_on_gpu { "its GPU" } else { "host memory" },
    )
}

/// The offload with which a stage would fit, the fastest first.
fn would_fit(
    stages: &[ZeroStage],
    room: Room,
    needs: &Needs<'_>,
    offload: &OffloadSettings,
) -> Option<(ZeroStage, String)> {
    let none = OffloadDevice::None;
    let places: &[OffloadDevice] =
        if room.is_on_gpu { &[OffloadDevice::Cpu, OffloadDevice::Nvme] } else { &[OffloadDevice::Nvme] };
    let pairs = places.iter().flat_map(|&place| [(place, none), (none, place), (place, place)]);
    for (optimizer, params) in pairs {
        let more = |asked: OffloadDevice, tried: OffloadDevice| if tried == none { asked } else { tried };
        let with = OffloadSettings {
            optimizer: more(offload.optimizer, optimizer),
            params: more(offload.params, params),
            ..offload.clone()
        };
        if let Some(stage) = stages.iter().find(|stage| fits(&needs(**stage, &with), room)) {
            let keys = [("offload_optimizer_device", optimizer), ("offload_param_device", params)];
            let named = keys.iter().filter(|(_, place)| *place != none).map(|(key, place)| format!("`{key}: {place}`"));
            return Some((*stage, named.collect::<Vec<_>>().join(" and ")));
        }
    }
    None
}

/// What there is to say of stage 3 where less sharing fits as well.
fn faster(room: Room, needs: &Needs<'_>, offload: &OffloadSettings) -> Option<String> {
    let stage = STAGES[..3].iter().find(|stage| fits(&needs(**stage, offload), room))?;
    Some(format!(
        "3 gathers each block for each visit; stage {} is faster and fits too ({} of {} that are free)",
        stage.number(),
        units::bytes(needed(&needs(*stage, offload), room)),
        units::bytes(room.device)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A model of 8 GiB of frozen weights and 1 GiB of trained values over 4 ranks; activations take 2 GiB.
    fn needs(stage: ZeroStage, offload: &OffloadSettings) -> Estimate {
        let share = |from: ZeroStage, bytes: u64| if stage >= from { bytes / 4 } else { bytes };
        let (optimizer, weights) = (share(ZeroStage::Optimizer, 2 * GIB), share(ZeroStage::Parameters, 8 * GIB));
        let gradients = share(ZeroStage::Gradients, GIB);
        let (away, home) = (offload.params != OffloadDevice::None, offload.optimizer != OffloadDevice::None);
        let on_host = |place, bytes| if place == OffloadDevice::Cpu { bytes } else { 0 };
        Estimate {
            weights: if away { GIB } else { weights },
            trained: GIB,
            gradients: if home { 0 } else { gradients },
            optimizer: if home { 0 } else { optimizer },
            activations: 2 * GIB,
            kv_cache: 100 * GIB,
            host: on_host(offload.params, 8 * GIB / 4) + on_host(offload.optimizer, optimizer),
            ..Estimate::default()
        }
    }

    fn gpu(device: u64) -> Room {
        Room { device: device * GIB, host: 64 * GIB, is_on_gpu: true }
    }

    #[test]
    fn what_a_rollout_cannot_do_without_counts_and_its_cache_does_not() {
        let generating = |stage: ZeroStage, offload: &OffloadSettings| {
            // In stage 3 all weights are gathered while it generates.
            let gathered = if stage == ZeroStage::Parameters { 6 * GIB } else { 0 };
            Estimate { rollout: gathered + 2 * GIB, least_rollout: gathered + GIB, ..needs(stage, offload) }
        };
        let none = OffloadSettings::default();
        // 2 + 1 + 0.5 and 7 of the rollout; training alone would take 2 + 1 + 0.5 + 0.25 + 2.
        assert!(choose(4, gpu(10), &generating, &none).is_err());
        assert_eq!(choose(4, gpu(11), &generating, &none).unwrap().0, ZeroStage::Parameters);
        assert_eq!(choose(4, gpu(10), &needs, &none).unwrap().0, ZeroStage::Parameters);
    }

    #[test]
    fn the_first_stage_that_fits_is_taken_and_says_why() {
        let none = OffloadSettings::default();
        let of = |gib| choose(4, gpu(gib), &needs, &none).unwrap();
        // 8 + 1 + 2 + 1 + 2; then 8 + 1 + 0.5 + 1 + 2, 8 + 1 + 0.5 + 0.25 + 2, 2 + 1 + 0.5 + 0.25 + 2.
        assert_eq!(of(14).0, ZeroStage::Replicated);
        assert_eq!(of(13).0, ZeroStage::Optimizer);
        assert_eq!(of(12).0, ZeroStage::Gradients);
        assert_eq!(of(11).0, ZeroStage::Parameters);
        assert_eq!(of(6).0, ZeroStage::Parameters);
        assert!(of(14).1.starts_with("auto: 0, everything fits on every rank (14.0 GiB"), "{}", of(14).1);
        let why = of(12).1;
        assert!(why.contains("auto: 2, the first that fits") && why.contains("stage 1 takes 12.5 GiB"), "{why}");
    }

    #[test]
    fn offloads_are_named_and_never_turned_on() {
        let none = OffloadSettings::default();
        let error = choose(4, gpu(5), &needs, &none).unwrap_err().to_string();
        for part in ["`zero_stage: auto` finds no stage", "5.75 GiB of its GPU", "`offload_optimizer_device: cpu`"] {
            assert!(error.contains(part), "`{part}` is missing in {error}");
        }
        assert!(error.contains("`zero_stage: 3` tries it all the same"), "{error}");
        // Where host memory has no room, files have.
        let error = choose(4, Room { host: GIB / 4, ..gpu(5) }, &needs, &none).unwrap_err().to_string();
        assert!(error.contains("`offload_optimizer_device: nvme`"), "{error}");
        let error = choose(4, gpu(2), &needs, &none).unwrap_err().to_string();
        assert!(error.contains("no offload would be enough"), "{error}");
        // What was asked for acts.
        let asked = OffloadSettings { optimizer: OffloadDevice::Cpu, ..OffloadSettings::default() };
        assert_eq!(choose(4, gpu(5), &needs, &asked).unwrap().0, ZeroStage::Parameters);
        assert_eq!(choose(4, gpu(11), &needs, &asked).unwrap().0, ZeroStage::Replicated);
        // One rank has no stages.
        assert!(choose(1, gpu(13), &needs, &none).unwrap_err().to_string().contains("in stage 0 a rank takes"));
        assert_eq!(choose(1, gpu(14), &needs, &none).unwrap().0, ZeroStage::Replicated);
    }

    #[test]
    fn on_the_cpu_host_memory_is_the_device() {
        let room = |gib: u64| Room { device: gib * GIB, host: gib * GIB, is_on_gpu: false };
        let needs = |stage, offload: &OffloadSettings| needs(stage, &acting(offload, false));
        let none = OffloadSettings::default();
        assert_eq!(choose(4, room(14), &needs, &none).unwrap().0, ZeroStage::Replicated);
        let error = choose(4, room(5), &needs, &none).unwrap_err().to_string();
        assert!(error.contains("host memory") && error.contains("`offload_optimizer_device: nvme`"), "{error}");
        // Host memory is no other place there.
        let cpu = OffloadDevice::Cpu;
        let asked = OffloadSettings { optimizer: cpu, params: cpu, ..OffloadSettings::default() };
        assert_eq!(choose(4, room(12), &needs, &asked).unwrap().0, ZeroStage::Gradients);
    }

    #[test]
    fn stage_three_says_where_less_would_do() {
        let none = OffloadSettings::default();
        let note = faster(gpu(13), &needs, &none).unwrap();
        assert!(note.contains("stage 1 is faster and fits too (12.5 GiB of 13.0 GiB"), "{note}");
        assert_eq!(faster(gpu(11), &needs, &none), None);
    }
}
