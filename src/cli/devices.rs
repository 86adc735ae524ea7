//! `CUDA_VISIBLE_DEVICES` as some schedulers fill it: with numbers of their own, which the driver takes for GPUs that are not there.
//!
//! The driver reads the variable once, when the program first asks it. So what is understood otherwise is put right before, by
//! starting the program again in its own place.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::path::Path;

use anyhow::Context as _;

use crate::device::IS_BUILT_FOR_GPUS;
use crate::ranks::device::{Gpu, resolve};

const VARIABLE: &str = "CUDA_VISIBLE_DEVICES";
/// Says that it was put right, so that it is not tried twice.
const IS_RESOLVED: &str = "TRAINER_VISIBLE_DEVICES_RESOLVED";
/// Where the driver lists a machine's GPUs, and where a process opens them.
const PLACES: [&str; 2] = ["/proc/driver/nvidia/gpus", "/dev"];

/// Starts the program again with a list that the driver understands, where the one there is the scheduler's own and what it means
/// can be found out. Returns where there is nothing to put right.
///
/// # Errors
/// If the program cannot be started again.
pub(super) fn put_right(environment: &BTreeMap<String, String>) -> anyhow::Result<()> {
    if !IS_BUILT_FOR_GPUS || !environment.contains_key(VARIABLE) || environment.contains_key(IS_RESOLVED) {
        return Ok(());
    }
    let gpus = gpus(Path::new(PLACES[0]), Path::new(PLACES[1]));
    if gpus.is_empty() {
        return Ok(());
    }
    match resolve(environment, &gpus) {
        Ok(resolution) => {
            if let Some(note) = resolution.note {
                tracing::warn!("{note}");
            }
            let Some(list) = resolution.corrected else { return Ok(()) };
            let program = std::env::current_exe().context("cannot find this program to start it again")?;
            let mut command = std::process::Command::new(program);
            command.args(std::env::args_os().skip(1)).env(VARIABLE, list).env(IS_RESOLVED, "1");
            // The list counts by the places on the bus, the driver by itself by speed.
            command.env("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
            Err(command.exec()).context("cannot start this program again with other visible devices")
        }
        // It may be meant to hide all; a run that needs a GPU says that it has none.
        Err(error) => {
            tracing::debug!("{error}");
            Ok(())
        }
    }
}

/// The GPUs of this machine that this process may open, in the driver's order.
fn gpus(listed: &Path, devices: &Path) -> Vec<Gpu> {
    let Ok(folders) = std::fs::read_dir(listed) else { return Vec::new() };
    let mut folders: Vec<_> = folders.filter_map(|entry| Some(entry.ok()?.path())).collect();
    // By their place on the bus.
    folders.sort();
    let visible = folders.iter().filter_map(|folder| {
        let text = std::fs::read_to_string(folder.join("information")).ok()?;
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let (uuid, minor) = (value("GPU UUID:")?, value("Device Minor:")?);
        // A cgroup hides the others.
        std::fs::File::open(devices.join(format!("nvidia{minor}"))).ok()?;
        Some(uuid.to_string())
    });
    visible.enumerate().map(|(index, uuid)| Gpu { index, uuid }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_those_that_can_be_opened_by_their_place_on_the_bus() {
        let folder = tempfile::tempdir().unwrap();
        let (listed, devices) = (folder.path().join("gpus"), folder.path().join("dev"));
        std::fs::create_dir_all(&devices).unwrap();
        for (place, uuid, minor, is_there) in [
            ("0000:c1:00.0", "GPU-b", 1, true),
            ("0000:41:00.0", "GPU-a", 0, true),
            ("0000:e1:00.0", "GPU-c", 2, false),
        ] {
            let own = listed.join(place);
            std::fs::create_dir_all(&own).unwrap();
            let text =
                format!("Model: \t\t NVIDIA H200\nIRQ:   \t\t 33\nGPU UUID: \t {uuid}\nDevice Minor: \t {minor}\n");
            std::fs::write(own.join("information"), text).unwrap();
            if is_there {
                std::fs::write(devices.join(format!("nvidia{minor}")), "").unwrap();
            }
        }
        let found = gpus(&listed, &devices);
        let gpu = |index, uuid: &str| Gpu { index, uuid: uuid.into() };
        assert_eq!(found, [gpu(0, "GPU-a"), gpu(1, "GPU-b")]);
        // As Slurm's numbers of a whole cluster come.
        let environment = [(VARIABLE.to_string(), "21000,21001".to_string())].into();
        assert_eq!(resolve(&environment, &found).unwrap().corrected.as_deref(), Some("0,1"));
        assert!(gpus(Path::new("/nowhere"), &devices).is_empty());
    }
}
