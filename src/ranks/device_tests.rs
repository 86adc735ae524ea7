use std::time::Duration;

use super::*;
use crate::ranks::local::Threads;

fn node(count: usize) -> Vec<Gpu> {
    (0..count).map(|index| Gpu { index, uuid: format!("GPU-{index}a{index}b-77") }).collect()
}

fn environment(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
    entries.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
}

fn visible_to(value: &str, gpus: usize) -> Result<Resolution, Error> {
    resolve(&environment(&[("CUDA_VISIBLE_DEVICES", value)]), &node(gpus))
}

#[test]
fn the_variable_is_read_as_the_driver_reads_it() {
    let index = DeviceName::Index;
    for (value, expected) in [
        (None, VisibleDevices::All),
        (Some(""), VisibleDevices::None),
        (Some("-1"), VisibleDevices::None),
        (Some("NoDevFiles"), VisibleDevices::None),
        (Some("1, 0"), VisibleDevices::List(vec![index(1), index(0)])),
        (Some("2,-1,0"), VisibleDevices::List(vec![index(2)])),
        (Some("21000,21001"), VisibleDevices::List(vec![index(21000), index(21001)])),
        (Some("GPU-8932f937"), VisibleDevices::List(vec![DeviceName::Uuid("GPU-8932f937".into())])),
        (Some("MIG-1/2/3"), VisibleDevices::List(vec![DeviceName::Mig("MIG-1/2/3".into())])),
    ] {
        assert_eq!(VisibleDevices::parse(value), Ok(expected), "{value:?}");
    }
    for value in ["0,0", "zero", "0;1", "GPU-1,GPU-1", "0,,1"] {
        assert!(matches!(VisibleDevices::parse(Some(value)), Err(Error::Unclear { .. })), "{value}");
    }
}

#[test]
fn indices_and_uuids_of_the_node_are_taken_as_they_are() {
    for (value, gpus) in [("0,1", vec![0, 1]), ("3", vec![3]), ("2,0", vec![2, 0]), ("GPU-1a", vec![1])] {
        let resolution = visible_to(value, 4).unwrap();
        assert_eq!(resolution, Resolution { gpus, corrected: None, note: None }, "{value}");
    }
    assert_eq!(resolve(&BTreeMap::new(), &node(3)).unwrap().gpus, [0, 1, 2]);
    assert!(matches!(visible_to("", 4), Err(Error::Hidden { .. })));
}

#[test]
fn ids_of_the_scheduler_are_understood_where_slurm_or_the_cgroup_tells_what_they_are() {
    // A cgroup shows two GPUs, for two ids.
    let resolution = visible_to("21000,21001", 2).unwrap();
    assert_eq!((&resolution.gpus[..], resolution.corrected.as_deref()), (&[0, 1][..], Some("0,1")));
    assert!(resolution.note.unwrap().contains("21000,21001"));
    // Without a cgroup Slurm's own variable names the granted ones.
    let granted = environment(&[("CUDA_VISIBLE_DEVICES", "21002,21003"), ("SLURM_STEP_GPUS", "2,3")]);
    let resolution = resolve(&granted, &node(4)).unwrap();
    assert_eq!((&resolution.gpus[..], resolution.corrected.as_deref()), (&[2, 3][..], Some("2,3")));
    assert!(resolution.note.unwrap().contains("SLURM_STEP_GPUS"));
    // A variable of the step that holds the same ids does not help; the job's does.
    let second =
        environment(&[("CUDA_VISIBLE_DEVICES", "21002"), ("SLURM_STEP_GPUS", "21002"), ("SLURM_JOB_GPUS", "1")]);
    assert_eq!(resolve(&second, &node(4)).unwrap().gpus, [1]);
}

#[test]
fn ids_that_nothing_explains_are_an_error_with_the_fix() {
    for (value, gpus) in [("21000,21001", 4), ("21000", 2), ("0,21000", 2), ("4", 4)] {
        let error = visible_to(value, gpus).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(value) && text.contains("unset CUDA_VISIBLE_DEVICES"), "{text}");
    }
    assert!(visible_to("1,GPU-1a", 4).unwrap_err().to_string().contains("named before"));
    assert_eq!(visible_to("MIG-a,MIG-b", 1).unwrap().gpus, [0, 1]);
    assert!(visible_to("GPU-9", 4).unwrap_err().to_string().contains("nvidia-smi -L"));
    assert!(visible_to("GPU-", 4).unwrap_err().to_string().contains("more than one"));
}

#[test]
fn each_local_rank_takes_its_own_gpu_or_the_only_one() {
    assert_eq!((0..4).map(|rank| local_device(rank, 4, 4).unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(local_device(1, 2, 8), Ok(1));
    // srun --gpus-per-task=1 shows each task its own GPU as number 0.
    assert_eq!(local_device(3, 4, 1), Ok(0));
    let error = local_device(0, 4, 2).unwrap_err();
    assert_eq!(error, Error::TooFew { ranks: 4, gpus: 2, local_rank: 2 });
    assert!(error.to_string().contains("--gres=gpu:4") && error.to_string().contains("num_processes: 2"));
    assert!(local_device(0, 1, 0).is_err());
}

fn device(rank: usize, host: &str, local_rank: usize, uuid: &str) -> RankDevice {
    RankDevice {
        rank,
        host: host.into(),
        local_rank,
        ordinal: 0,
        uuid: uuid.into(),
        visible_devices: Some("21000,21001".into()),
    }
}

#[test]
fn two_ranks_on_one_gpu_are_named_with_their_hosts_and_the_fix() {
    let devices = [device(0, "n1", 0, "GPU-a"), device(1, "n1", 1, "GPU-b"), device(2, "n1", 2, "GPU-a")];
    assert_eq!(check_duplicates(&devices[..2]), Ok(()));
    let text = check_duplicates(&devices).unwrap_err().to_string();
    for part in [
        "duplicate GPU detected",
        "rank 0 (host n1, local rank 0)",
        "rank 2 (host n1, local rank 2)",
        "GPU-a",
        "CUDA_VISIBLE_DEVICES=`21000,21001`",
        "unset CUDA_VISIBLE_DEVICES",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let twice = check_duplicates(&[device(0, "n1", 0, "GPU-a"), device(1, "n1", 0, "GPU-a")]).unwrap_err();
    assert!(twice.to_string().contains("start the run once"), "{twice}");
    let cloned = check_duplicates(&[device(0, "n1", 0, "GPU-a"), device(1, "n2", 0, "GPU-a")]).unwrap_err();
    assert!(cloned.to_string().contains("two hosts"), "{cloned}");
}

#[test]
fn every_rank_hears_of_a_duplicate() {
    let run = |uuids: [&'static str; 3], may_share: bool| -> Vec<Result<Vec<RankDevice>, Error>> {
        let group = Threads::group(3, Duration::from_secs(20)).unwrap();
        std::thread::scope(|scope| {
            let handles: Vec<_> = group
                .into_iter()
                .enumerate()
                .map(|(rank, threads)| {
                    scope.spawn(move || exchange(&threads, &device(rank, "n", rank, uuids[rank]), may_share))
                })
                .collect();
            handles.into_iter().map(|handle| handle.join().unwrap()).collect()
        })
    };
    for result in run(["a", "b", "c"], false) {
        assert_eq!(result.unwrap().iter().map(|d| d.uuid.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    }
    for result in run(["a", "b", "b"], false) {
        assert!(matches!(result, Err(Error::Duplicate { first, second }) if first.rank == 1 && second.rank == 2));
    }
    assert!(run(["a", "b", "b"], true).iter().chain(&run(["", "", ""], false)).all(Result::is_ok));
    for result in run(["a", "", "b"], true) {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("rank 1 (host n) computes on the CPU, rank 0 (host n) on a GPU"), "{text}");
    }
}
