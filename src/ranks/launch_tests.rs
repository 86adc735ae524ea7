use super::*;

fn read(entries: &[(&str, &str)]) -> Result<Option<Place>, Error> {
    place(&entries.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect())
}

const STEP: [(&str, &str); 9] = [
    ("SLURM_JOB_ID", "4711"),
    ("SLURM_STEP_ID", "0"),
    ("SLURM_PROCID", "5"),
    ("SLURM_NTASKS", "7"),
    ("SLURM_STEP_NUM_TASKS", "7"),
    ("SLURM_LOCALID", "1"),
    ("SLURM_NODEID", "2"),
    ("SLURM_STEP_NODELIST", "node[01-03],gpu5"),
    ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1"),
];

fn with(
    base: &[(&'static str, &'static str)],
    changes: &[(&'static str, &'static str)],
) -> Result<Option<Place>, Error> {
    let mut entries: Vec<_> = base.iter().filter(|(k, _)| !changes.iter().any(|(c, _)| c == k)).copied().collect();
    entries.extend(changes);
    read(&entries)
}

#[test]
fn srun_gives_rank_hosts_and_a_meeting_point() {
    let place = read(&STEP).unwrap().unwrap();
    assert_eq!(
        place,
        Place {
            launcher: Launcher::Srun,
            rank: 5,
            world_size: 7,
            local_rank: 1,
            local_world_size: Some(2),
            hosts: vec!["node01".into(), "node02".into(), "node03".into(), "gpu5".into()],
            rendezvous: Some(("node01".into(), 20_376)),
        }
    );
    let elsewhere = with(&STEP, &[("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "1234")]).unwrap().unwrap();
    assert_eq!(elsewhere.rendezvous, Some(("10.0.0.1".into(), 1234)));
}

#[test]
fn an_sbatch_script_and_a_plain_shell_have_no_place() {
    assert_eq!(read(&[]), Ok(None));
    let script = [
        ("SLURM_JOB_ID", "1"),
        ("SLURM_PROCID", "0"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_JOB_NODELIST", "n[1-2]"),
    ];
    assert_eq!(read(&script), Ok(None));
}

#[test]
fn a_step_smaller_than_its_job_counts_its_own_tasks() {
    let alone = with(
        &STEP,
        &[
            ("SLURM_PROCID", "0"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "0"),
            ("SLURM_STEP_NUM_TASKS", "1"),
            ("SLURM_STEP_NODELIST", "gpu5"),
            ("SLURM_STEP_TASKS_PER_NODE", "1"),
            ("SLURM_TASKS_PER_NODE", "2(x3),1"),
        ],
    );
    let alone = alone.unwrap().unwrap();
    assert_eq!((alone.rank, alone.world_size, alone.local_world_size), (0, 1, Some(1)));
    assert_eq!(alone.hosts, ["gpu5"]);
}

#[test]
fn torchrun_and_mpirun_give_their_places() {
    let torchrun = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "host"),
        ("MASTER_PORT", "29400"),
    ];
    let place = read(&torchrun).unwrap().unwrap();
    assert_eq!((place.rank, place.world_size, place.local_rank, place.local_world_size), (3, 4, 1, Some(2)));
    assert_eq!((place.launcher, place.rendezvous), (Launcher::Torchrun, Some(("host".into(), 29_400))));

    let mpirun = [
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ];
    let place = read(&mpirun).unwrap().unwrap();
    assert_eq!((place.launcher, place.rank, place.local_world_size), (Launcher::Mpirun, 1, Some(2)));
    assert_eq!(place.rendezvous, Some(("127.0.0.1".into(), 29_500)));
    // Over several nodes nobody has said where to meet.
    assert_eq!(
        with(&mpirun, &[("OMPI_COMM_WORLD_LOCAL_SIZE", "1"), ("OMPI_COMM_WORLD_LOCAL_RANK", "0")])
            .unwrap()
            .unwrap()
            .rendezvous,
        None
    );
}

#[test]
fn the_inner_launcher_goes_first() {
    // srun starts one torchrun per node, torchrun two ranks each.
    let inner = [
        ("TORCHELASTIC_RUN_ID", "x"),
        ("RANK", "7"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "node01"),
    ];
    let place = with(&STEP, &inner).unwrap().unwrap();
    assert_eq!((place.launcher, place.rank, place.world_size), (Launcher::Torchrun, 7, 8));
    // torchrun has the port itself.
    assert_eq!(place.rendezvous, Some(("node01".into(), 29_501)));
    let mpi = [
        ("OMPI_COMM_WORLD_RANK", "6"),
        ("OMPI_COMM_WORLD_SIZE", "8"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ];
    assert_eq!(with(&STEP, &mpi).unwrap().unwrap().launcher, Launcher::Mpirun);
}

#[test]
fn exported_variables_must_agree_with_srun() {
    let agree = [("RANK", "5"), ("WORLD_SIZE", "7"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node01")];
    let place = with(&STEP, &agree).unwrap().unwrap();
    assert_eq!((place.launcher, place.hosts.len(), place.local_world_size), (Launcher::Srun, 4, Some(2)));
    assert_eq!(place.rendezvous, Some(("node01".into(), 29_500)));
    for (change, what) in
        [(("RANK", "4"), "rank 4"), (("WORLD_SIZE", "8"), "world size 8"), (("LOCAL_RANK", "0"), "local rank 0")]
    {
        let mut entries: Vec<_> = agree.into_iter().filter(|(key, _)| *key != change.0).collect();
        entries.push(change);
        let error = with(&STEP, &entries).unwrap_err();
        assert!(matches!(error, Error::Conflict { .. }) && error.to_string().contains(what), "{error}");
        assert!(error.to_string().contains("srun"), "{error}");
    }
}

#[test]
fn incomplete_and_impossible_variables_are_errors_that_name_them() {
    for (entries, part) in [
        (&[("RANK", "0")][..], "WORLD_SIZE is not"),
        (&[("WORLD_SIZE", "2")], "RANK is not"),
        (&[("RANK", "0"), ("WORLD_SIZE", "2")], "LOCAL_RANK is not"),
        (&[("RANK", "2"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")], "RANK=`2`: WORLD_SIZE is 2"),
        (&[("RANK", "one"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")], "RANK=`one`: it is not a count"),
        (&[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "2")], "LOCAL_RANK=`2`"),
        (&[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "99999")], "MASTER_PORT=`99999`"),
        (&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2")], "OMPI_COMM_WORLD_LOCAL_RANK is not"),
    ] {
        let text = read(entries).unwrap_err().to_string();
        assert!(text.contains(part), "{part}: {text}");
    }
    for (change, part) in [
        (("SLURM_STEP_NODELIST", "node[01-"), "SLURM_STEP_NODELIST: host list"),
        (("SLURM_STEP_TASKS_PER_NODE", "2(x3"), "without `)`"),
        (("SLURM_NODEID", "4"), "SLURM_NODEID=`4`"),
        (("SLURM_LOCALID", "2"), "SLURM_LOCALID=`2`"),
        (("SLURM_LOCALID", ""), "SLURM_LOCALID is not"),
        (("SLURM_PROCID", "7"), "SLURM_PROCID=`7`"),
    ] {
        let text = with(&STEP, &[change]).unwrap_err().to_string();
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn ranks_that_the_program_starts_itself_know_it_whatever_is_around() {
    let own = own_place(1, 3, 4321).map(|(name, value)| (name, value));
    let mut entries: Vec<(&str, &str)> = own.iter().map(|(name, value)| (*name, value.as_str())).collect();
    entries.extend(STEP);
    let place = read(&entries).unwrap().unwrap();
    assert_eq!((place.launcher, place.rank, place.world_size, place.local_rank), (Launcher::Own, 1, 3, 1));
    assert_eq!(place.rendezvous, Some(("127.0.0.1".into(), 4321)));
    assert!(matches!(read(&[("TRAINER_RANK", "1")]), Err(Error::Missing { missing: "TRAINER_WORLD_SIZE", .. })));
}
