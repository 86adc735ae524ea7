//! A process's place among the ranks, from the environment of whatever started it.
//!
//! `srun`, `torchrun` and `mpirun` each say it in their own variables. [`place`] is a pure function of them; where two
//! launchers disagree it refuses to guess. Inside an sbatch script or on a plain shell there is no place: the
//! process is then the one that starts the ranks of its node itself.

use std::collections::BTreeMap;

use super::hostlist;

/// What is wrong with the launch environment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A launcher's variables are incomplete.
    #[error("{launcher} environment: {present} is set but {missing} is not; set both or unset {present}")]
    Missing {
        /// Whose variables.
        launcher: Launcher,
        /// One that is there.
        present: &'static str,
        /// The one that is not.
        missing: &'static str,
    },
    /// A variable that is not what it should be.
    #[error("{variable}=`{value}`: {problem}; check how the ranks are launched")]
    Value {
        /// Which variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        problem: String,
    },
    /// Two launchers say different things.
    #[error(
        "{first} says {what} {left}, {second} says {right}; launch with one of the two, or unset the variables of \
         the other"
    )]
    Conflict {
        /// One launcher.
        first: Launcher,
        /// The other.
        second: Launcher,
        /// What they disagree about.
        what: &'static str,
        /// What the one says.
        left: usize,
        /// What the other says.
        right: usize,
    },
    /// Slurm's list of nodes cannot be read.
    #[error("{variable}: {source}")]
    Hosts {
        /// Which variable.
        variable: &'static str,
        /// Why.
        source: hostlist::Error,
    },
}

/// Who started the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// This program, which starts the ranks of a machine itself.
    Own,
    /// Slurm's `srun`.
    Srun,
    /// `torchrun`, accelerate, or anything else that sets `RANK` and `WORLD_SIZE`.
    Torchrun,
    /// Open MPI's `mpirun`.
    Mpirun,
}

impl std::fmt::Display for Launcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Own => "trainer (TRAINER_*)",
            Self::Srun => "srun (SLURM_*)",
            Self::Torchrun => "torchrun (RANK, WORLD_SIZE)",
            Self::Mpirun => "mpirun (OMPI_*)",
        })
    }
}

/// Where a process stands among the ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Who says so.
    pub launcher: Launcher,
    /// This rank, in `0..world_size`.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Number of this rank on its node.
    pub local_rank: usize,
    /// Ranks on this node, where the launcher tells.
    pub local_world_size: Option<usize>,
    /// Hosts of the run in the order of Slurm; empty where the launcher does not tell.
    pub hosts: Vec<String>,
    /// Where the ranks meet: host and port. `None` where it must be given in another way.
    pub rendezvous: Option<(String, u16)>,
}

/// First of the ports that are derived from a Slurm job id; below the range of ephemeral ports.
const FIRST_PORT: u64 = 15_000;
/// Number of such ports.
const PORTS: u64 = 10_000;
/// Where ranks of one machine meet when the launcher names no port.
const DEFAULT_PORT: u16 = 29_500;

/// What the program tells the ranks that it starts itself: the rank, how many there are, and the port of rank 0.
const OWN: [&str; 3] = ["TRAINER_RANK", "TRAINER_WORLD_SIZE", "TRAINER_PORT"];

/// The variables that give a process its place among the ranks that this program starts on a machine.
pub fn own_place(rank: usize, world_size: usize, port: u16) -> [(&'static str, String); 3] {
    let [rank_name, size_name, port_name] = OWN;
    [(rank_name, rank.to_string()), (size_name, world_size.to_string()), (port_name, port.to_string())]
}

/// The place that `environment` (a process's variables) gives, or `None` where no launcher did.
///
/// This program's own ranks are told by variables of their own, whatever is around it. An inner launcher goes before the one around it: `torchrun` (recognised by `TORCHELASTIC_RUN_ID`) and `mpirun` may
/// themselves be started by `srun`, whose variables then describe the launcher. A plain `RANK` and `WORLD_SIZE`, as
/// scripts export them, must agree with `srun`'s.
///
/// # Errors
/// If variables are incomplete, not numbers, contradict each other, or the node list cannot be read.
pub fn place(environment: &BTreeMap<String, String>) -> Result<Option<Place>, Error> {
    let variables = Variables(environment);
    if let Some(place) = own(&variables)? {
        return Ok(Some(place));
    }
    let torchrun = torchrun(&variables)?;
    if variables.has("TORCHELASTIC_RUN_ID") && torchrun.is_some() {
        return Ok(torchrun);
    }
    let mpirun = mpirun(&variables)?;
    // mpirun inside a Slurm job starts its daemons with srun; their variables are not the ranks'.
    let srun = if mpirun.is_some() { None } else { srun(&variables)? };
    let outer = mpirun.or(srun);
    match (torchrun, outer) {
        (Some(torchrun), Some(outer)) => agreed(torchrun, outer).map(Some),
        (torchrun, outer) => Ok(torchrun.or(outer)),
    }
}

/// Two descriptions of one place: both must say the same. What only one knows is kept.
fn agreed(torchrun: Place, outer: Place) -> Result<Place, Error> {
    for (what, left, right) in [
        ("rank", torchrun.rank, outer.rank),
        ("world size", torchrun.world_size, outer.world_size),
        ("local rank", torchrun.local_rank, outer.local_rank),
    ] {
        if left != right {
            return Err(Error::Conflict { first: torchrun.launcher, second: outer.launcher, what, left, right });
        }
    }
    Ok(Place {
        rendezvous: torchrun.rendezvous.or(outer.rendezvous),
        local_world_size: torchrun.local_world_size.or(outer.local_world_size),
        ..outer
    })
}

fn own(variables: &Variables<'_>) -> Result<Option<Place>, Error> {
    let launcher = Launcher::Own;
    let [rank_name, size_name, port_name] = OWN;
    let Some((rank, world_size)) = variables.rank_and_size(launcher, rank_name, size_name)? else { return Ok(None) };
    let missing = Error::Missing { launcher, present: rank_name, missing: port_name };
    let port = variables.count(port_name)?.and_then(|port| u16::try_from(port).ok()).ok_or(missing)?;
    Ok(Some(Place {
        launcher,
        rank,
        world_size,
        local_rank: rank,
        local_world_size: Some(world_size),
        hosts: Vec::new(),
        rendezvous: Some(("127.0.0.1".into(), port)),
    }))
}

fn torchrun(variables: &Variables<'_>) -> Result<Option<Place>, Error> {
    let launcher = Launcher::Torchrun;
    let Some((rank, world_size)) = variables.rank_and_size(launcher, "RANK", "WORLD_SIZE")? else { return Ok(None) };
    let local_rank = match variables.count("LOCAL_RANK")? {
        Some(local_rank) => local_rank,
        None if world_size == 1 => 0,
        None => return Err(Error::Missing { launcher, present: "RANK", missing: "LOCAL_RANK" }),
    };
    let local_world_size = variables.count("LOCAL_WORLD_SIZE")?;
    check_local("LOCAL_RANK", local_rank, local_world_size.unwrap_or(world_size))?;
    let mut rendezvous = variables.master()?;
    if let Some((_, port)) = rendezvous.as_mut().filter(|_| variables.has("TORCHELASTIC_RUN_ID")) {
        // torchrun itself listens at the port that it names.
        *port = port.checked_add(1).unwrap_or(FIRST_PORT as u16);
    }
    Ok(Some(Place { launcher, rank, world_size, local_rank, local_world_size, hosts: Vec::new(), rendezvous }))
}

fn mpirun(variables: &Variables<'_>) -> Result<Option<Place>, Error> {
    let launcher = Launcher::Mpirun;
    let (rank_name, size_name) = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
    let Some((rank, world_size)) = variables.rank_and_size(launcher, rank_name, size_name)? else { return Ok(None) };
    let local_name = "OMPI_COMM_WORLD_LOCAL_RANK";
    let missing = Error::Missing { launcher, present: rank_name, missing: local_name };
    let local_rank = variables.count(local_name)?.ok_or(missing)?;
    let local_world_size = variables.count("OMPI_COMM_WORLD_LOCAL_SIZE")?;
    check_local(local_name, local_rank, local_world_size.unwrap_or(world_size))?;
    let is_one_node = local_world_size == Some(world_size);
    let rendezvous = variables.master()?.or_else(|| is_one_node.then(|| ("127.0.0.1".into(), DEFAULT_PORT)));
    Ok(Some(Place { launcher, rank, world_size, local_rank, local_world_size, hosts: Vec::new(), rendezvous }))
}

fn srun(variables: &Variables<'_>) -> Result<Option<Place>, Error> {
    // sbatch gives its script SLURM_PROCID=0 and the job's SLURM_NTASKS as well; only a step has these.
    let is_step = ["SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"]
        .into_iter()
        .any(|name| variables.has(name));
    if !is_step || !variables.has("SLURM_PROCID") {
        return Ok(None);
    }
    let launcher = Launcher::Srun;
    // The step's number of tasks goes before the job's: `srun -n 1` inside a job of 8 is one rank.
    let size_name = if variables.has("SLURM_STEP_NUM_TASKS") { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
    let Some((rank, world_size)) = variables.rank_and_size(launcher, "SLURM_PROCID", size_name)? else {
        return Ok(None);
    };
    let missing = Error::Missing { launcher, present: "SLURM_PROCID", missing: "SLURM_LOCALID" };
    let local_rank = variables.count("SLURM_LOCALID")?.ok_or(missing)?;
    let hosts = slurm_hosts(variables)?;
    let local_world_size = slurm_local_size(variables, world_size, hosts.len())?;
    check_local("SLURM_LOCALID", local_rank, local_world_size.unwrap_or(world_size))?;
    let derived = || hosts.first().map(|host| (host.clone(), slurm_port(variables)));
    let rendezvous = variables.master()?.or_else(derived);
    Ok(Some(Place { launcher, rank, world_size, local_rank, local_world_size, hosts, rendezvous }))
}

fn slurm_hosts(variables: &Variables<'_>) -> Result<Vec<String>, Error> {
    for variable in ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"] {
        if let Some(list) = variables.get(variable) {
            return hostlist::expand(list).map_err(|source| Error::Hosts { variable, source });
        }
    }
    Ok(Vec::new())
}

/// Ranks on this node: from Slurm's tasks per node (`2(x3),1`), or all of them on a single node.
fn slurm_local_size(variables: &Variables<'_>, world_size: usize, hosts: usize) -> Result<Option<usize>, Error> {
    for variable in ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"] {
        let Some(value) = variables.get(variable) else { continue };
        let tasks = tasks_per_node(value).map_err(|problem| Error::Value { variable, value: value.into(), problem })?;
        // The job's list describes another layout than the step's where their totals differ.
        if tasks.iter().sum::<usize>() != world_size {
            continue;
        }
        let node = variables.count("SLURM_NODEID")?.unwrap_or(0);
        return match tasks.get(node) {
            Some(&tasks) => Ok(Some(tasks)),
            None => Err(Error::Value {
                variable: "SLURM_NODEID",
                value: node.to_string(),
                problem: format!("{variable}=`{value}` has {} nodes", tasks.len()),
            }),
        };
    }
    Ok((hosts == 1).then_some(world_size))
}

/// `2(x3),1` is 2, 2, 2, 1.
fn tasks_per_node(text: &str) -> Result<Vec<usize>, String> {
    let mut all = Vec::new();
    for item in text.split(',') {
        let (tasks, times) = match item.split_once("(x") {
            None => (item, "1"),
            Some((tasks, rest)) => (tasks, rest.strip_suffix(')').ok_or("`(x` without `)`")?),
        };
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| format!("`{text}` is not a number"));
        let (tasks, times) = (number(tasks)?, number(times)?);
        if times > 65_536 {
            return Err(format!("{times} nodes are too many"));
        }
        all.extend(std::iter::repeat_n(tasks, times));
    }
    Ok(all)
}

/// A port that all ranks of a step derive alike and two jobs on a node rarely share.
fn slurm_port(variables: &Variables<'_>) -> u16 {
    let number = |names: [&'static str; 2]| {
        names.into_iter().find_map(|name| variables.get(name)?.parse::<u64>().ok()).unwrap_or(0)
    };
    let job = number(["SLURM_JOB_ID", "SLURM_JOBID"]);
    let step = number(["SLURM_STEP_ID", "SLURM_STEPID"]);
    (FIRST_PORT + (job.wrapping_mul(16).wrapping_add(step)) % PORTS) as u16
}

fn check_local(variable: &'static str, local_rank: usize, local_world_size: usize) -> Result<(), Error> {
    if local_rank < local_world_size {
        return Ok(());
    }
    let problem = format!("this node has {local_world_size} ranks, numbered from 0");
    Err(Error::Value { variable, value: local_rank.to_string(), problem })
}

/// The environment, where an empty value counts as not set.
struct Variables<'a>(&'a BTreeMap<String, String>);

impl<'a> Variables<'a> {
    fn get(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn count(&self, variable: &'static str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(variable) else { return Ok(None) };
        let wrong = |_| Error::Value { variable, value: value.into(), problem: "it is not a count".into() };
        value.parse().map(Some).map_err(wrong)
    }

    /// Both or neither, the rank below the size.
    fn rank_and_size(
        &self,
        launcher: Launcher,
        rank_name: &'static str,
        size_name: &'static str,
    ) -> Result<Option<(usize, usize)>, Error> {
        match (self.count(rank_name)?, self.count(size_name)?) {
            (None, None) => Ok(None),
            (Some(_), None) => Err(Error::Missing { launcher, present: rank_name, missing: size_name }),
            (None, Some(_)) => Err(Error::Missing { launcher, present: size_name, missing: rank_name }),
            (Some(rank), Some(size)) if rank < size => Ok(Some((rank, size))),
            (Some(rank), Some(size)) => Err(Error::Value {
                variable: rank_name,
                value: rank.to_string(),
                problem: format!("{size_name} is {size}, ranks are numbered from 0"),
            }),
        }
    }

    fn master(&self) -> Result<Option<(String, u16)>, Error> {
        let Some(address) = self.get("MASTER_ADDR") else { return Ok(None) };
        let port = match self.get("MASTER_PORT") {
            None => DEFAULT_PORT,
            Some(value) => value.parse().map_err(|_| Error::Value {
                variable: "MASTER_PORT",
                value: value.into(),
                problem: "it is not a port (1 to 65535)".into(),
            })?,
        };
        Ok(Some((address.into(), port)))
    }
}

#[cfg(test)]
#[path = "launch_tests.rs"]
mod tests;
