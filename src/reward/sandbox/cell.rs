//! Stage two: builds the file system, sets limits, gives up every right, and runs the program.
//!
//! The order matters. Mounts need rights, limits must not hinder mounts, rights go before the filter, and the filter comes
//! last because it forbids some of the rest.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, Scope, path_beneath_rules,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{
    Gid, Pid, Uid, chown, chroot, getppid, pivot_root, setgroups, sethostname, setresgid, setresuid, setsid,
};
use signal_hook::consts::SIGTERM;

use super::filter;
use super::plan::{Namespaces, Plan};
use super::warden::told;
use crate::reward::keeper::{self, tree};

/// Working directory and home of programs.
const HOME: &str = "/tmp";
/// Devices that programs may use.
const DEVICES: &[&str] = &["null", "zero", "full", "random", "urandom"];
/// Open files of one process.
const OPEN_FILES: u64 = 256;
/// Files and folders in the working directory.
const MOST_FILES: u64 = 4096;

/// Runs a plan for `warden` and returns how its program ended.
pub(in crate::reward) fn run(warden: Pid, text: &str) -> io::Result<ExitStatus> {
    let plan: Plan = serde_json::from_str(text)?;
    let is_alone = plan.layers.namespaces != Namespaces::None;
    let death = if is_alone { Signal::SIGKILL } else { Signal::SIGTERM };
    if !is_alone {
        // Nobody else would end what the program leaves behind.
        prctl::set_child_subreaper(true)?;
        let kill_all = || tree::kill_below(Pid::this());
        let mut signals = signal_hook::iterator::Signals::new([SIGTERM])?;
        std::thread::spawn(move || {
            if signals.forever().next().is_some() {
                kill_all();
                std::process::exit(1);
            }
        });
    }
    // In a process namespace the parent is outside, and its number 0.
    let parent = if is_alone { Pid::from_raw(0) } else { warden };
    keeper::die_with(parent, death)?;
    let _ = setsid();
    let user = plan.layers.user.id(warden.as_raw() as u32);
    let home = if is_alone {
        let _ = sethostname("sandbox");
        build_root(&plan, user)?;
        PathBuf::from(HOME)
    } else {
        let home = plan.files();
        give(&home, user)?;
        // The folder around it is the trainer's own, and is passed through by a path that is no secret.
        fs::set_permissions(&plan.folder, fs::Permissions::from_mode(0o711))?;
        home
    };
    std::env::set_current_dir(&home).map_err(told("working directory"))?;
    if plan.layers.landlock {
        restrict_files(&plan, &home)?;
    }
    drop_rights(user)?;
    // Changing the user has taken it back.
    prctl::set_pdeathsig(death)?;
    if getppid() != parent {
        return Err(io::Error::other("the warden is gone"));
    }
    limit(&plan, user)?;
    prctl::set_no_new_privs()?;
    prctl::set_dumpable(false)?;
    if plan.layers.filter {
        filter::apply(is_alone)?;
    }
    let (program, arguments) = plan.program.split_first().ok_or_else(|| io::Error::other("no program was named"))?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(environment(program, &home))
        .stderr(Stdio::null())
        .spawn()
        .map_err(told(program))?;
    child.wait()
}

fn environment(program: &str, home: &Path) -> Vec<(&'static str, String)> {
    let own = Path::new(program).parent().filter(|folder| folder.is_absolute());
    let path = own.map(|folder| format!("{}:", folder.display())).unwrap_or_default() + "/usr/local/bin:/usr/bin:/bin";
    let home = home.display().to_string();
    // Hashes of texts, and with them the order of sets, must not differ between two runs; one thread is fair to others.
    let fixed = [
        ("LANG", "C.UTF-8"),
        ("PYTHONHASHSEED", "0"),
        ("PYTHONDONTWRITEBYTECODE", "1"),
        ("PYTHONIOENCODING", "utf-8"),
        ("OMP_NUM_THREADS", "1"),
        ("OPENBLAS_NUM_THREADS", "1"),
        ("MKL_NUM_THREADS", "1"),
    ];
    let mut all = vec![("PATH", path), ("HOME", home.clone()), ("TMPDIR", home)];
    all.extend(fixed.map(|(name, value)| (name, value.to_owned())));
    all
}

/// Makes a root that holds what the program may read, a writable folder with its files, and nothing else.
fn build_root(plan: &Plan, user: Option<u32>) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| told("mount namespace")(e.into()))?;
    let no_source: Option<&str> = None;
    mount(no_source, "/", no_source, MsFlags::MS_REC | MsFlags::MS_PRIVATE, no_source)
        .map_err(|e| told("private mounts")(e.into()))?;
    let root = plan.root();
    mount_memory(&root, "size=1m,mode=755")?;
    for path in &plan.readable {
        show(&root, path).map_err(told(&format!("bind `{}`", path.display())))?;
    }
    for path in &plan.hidden {
        hide(&root, path).map_err(told(&format!("hide `{}`", path.display())))?;
    }
    let devices = root.join("dev");
    fs::create_dir_all(&devices)?;
    for name in DEVICES {
        let (from, to) = (Path::new("/dev").join(name), devices.join(name));
        File::create(&to)?;
        bind(&from, &to).map_err(told(&format!("bind `/dev/{name}`")))?;
    }
    for (name, number) in [("stdin", 0), ("stdout", 1), ("stderr", 2)] {
        symlink(format!("/proc/self/fd/{number}"), devices.join(name))?;
    }
    symlink("/proc/self/fd", devices.join("fd"))?;
    // A container may have covered parts of /proc, which then cannot be mounted anew; most programs do without.
    let proc = root.join("proc");
    fs::create_dir(&proc)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let _ = mount(Some("proc"), &proc, Some("proc"), flags, Some("subset=pid,hidepid=invisible"));
    let home = root.join(HOME.trim_start_matches('/'));
    fs::create_dir(&home)?;
    mount_memory(&home, &format!("size={},nr_inodes={MOST_FILES},mode=755", plan.limits.file_bytes))?;
    for entry in fs::read_dir(plan.files())? {
        let from = entry?.path();
        let to = home.join(from.file_name().unwrap_or_default());
        fs::copy(&from, &to)?;
    }
    give(&home, user)?;
    let read_only =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(no_source, &root, no_source, read_only, no_source).map_err(|e| told("read-only root")(e.into()))?;
    // The new root on top of the old, and then the old one away from below it.
    std::env::set_current_dir(&root)?;
    if pivot_root(".", ".").is_ok() {
        umount2(".", MntFlags::MNT_DETACH).map_err(|e| told("old root")(e.into()))?;
    } else {
        // The first root of a machine cannot be put away; the new one covers it, and nothing below leads back.
        mount(Some("."), "/", no_source, MsFlags::MS_MOVE, no_source).map_err(|e| told("new root")(e.into()))?;
        chroot(".").map_err(|e| told("chroot")(e.into()))?;
    }
    std::env::set_current_dir("/")
}

fn mount_memory(on: &Path, options: &str) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), on, Some("tmpfs"), flags, Some(options))
        .map_err(|e| told(&format!("tmpfs on `{}`", on.display()))(e.into()))
}

/// Shows a file or folder of the machine at the same place below `root`, read-only; a link as a link.
fn show(root: &Path, path: &Path) -> io::Result<()> {
    let inside = root.join(path.strip_prefix("/").unwrap_or(path));
    let metadata = path.symlink_metadata()?;
    if inside.symlink_metadata().is_ok() {
        return Ok(());
    }
    if let Some(parent) = inside.parent() {
        fs::create_dir_all(parent)?;
    }
    if metadata.is_symlink() {
        return symlink(fs::read_link(path)?, &inside);
    }
    if metadata.is_dir() {
        fs::create_dir(&inside)?;
    } else {
        File::create(&inside)?;
    }
    bind(path, &inside)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for mounted in mounts.lines().filter_map(mount_point).filter(|point| point.starts_with(&inside)) {
        make_read_only(&mounted)?;
    }
    Ok(())
}

/// The fifth field of a line of mountinfo.
fn mount_point(line: &str) -> Option<PathBuf> {
    let field = line.split(' ').nth(4)?;
    Some(PathBuf::from(
        field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\"),
    ))
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    let none: Option<&str> = None;
    Ok(mount(Some(from), to, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?)
}

fn make_read_only(point: &Path) -> io::Result<()> {
    let mut flags =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    // What is forbidden on a mount of the machine must stay so in a user namespace.
    let has = statvfs(point)?.flags();
    for (is, flag) in [
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ] {
        if has.contains(is) {
            flags |= flag;
        }
    }
    let none: Option<&str> = None;
    Ok(mount(none, point, none, flags, none)?)
}

/// Covers a path that lies in a folder which is shown.
fn hide(root: &Path, path: &Path) -> io::Result<()> {
    let inside = root.join(path.strip_prefix("/").unwrap_or(path));
    match inside.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => {
            // A folder on the way to something shown is nothing but that way.
            let is_only_a_way = metadata.dev() == root.metadata()?.dev();
            if is_only_a_way { Ok(()) } else { mount_memory(&inside, "size=4k,mode=755,ro") }
        }
        Ok(_) => bind(Path::new("/dev/null"), &inside),
        Err(_) => Ok(()),
    }
}

/// Gives a folder and the files in it to the program's user, so that it can write there.
fn give(folder: &Path, user: Option<u32>) -> io::Result<()> {
    let own = |path: &Path| match user {
        Some(user) => chown(path, Some(Uid::from_raw(user)), Some(Gid::from_raw(user))).map_err(io::Error::from),
        None => Ok(()),
    };
    for entry in fs::read_dir(folder)? {
        own(&entry?.path())?;
    }
    own(folder)
}

/// Forbids file access but to what the plan shows, and binding or connecting of sockets, as far as this kernel can.
fn restrict_files(plan: &Plan, home: &Path) -> io::Result<()> {
    let failed = |error: &dyn std::fmt::Display| io::Error::other(format!("Landlock: {error}"));
    let abi = ABI::V6;
    let read = AccessFs::from_read(abi);
    let devices: Vec<PathBuf> = DEVICES.iter().map(|name| Path::new("/dev").join(name)).collect();
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(|ruleset| {
            ruleset
                .set_compatibility(CompatLevel::BestEffort)
                .handle_access(AccessFs::from_all(abi))?
                .handle_access(AccessNet::from_all(abi))?
                .scope(Scope::from_all(abi))
        })
        .and_then(Ruleset::create)
        .and_then(|ruleset| ruleset.add_rules(path_beneath_rules(plan.readable.iter(), read)))
        .and_then(|ruleset| ruleset.add_rules(path_beneath_rules(devices, AccessFs::ReadFile | AccessFs::WriteFile)))
        .and_then(|ruleset| ruleset.add_rules(path_beneath_rules([home], AccessFs::from_all(abi))))
        .and_then(RulesetCreated::restrict_self)
        .map(drop)
        .map_err(|error| failed(&error))
}

/// Gives up groups, user and capabilities for good.
fn drop_rights(user: Option<u32>) -> io::Result<()> {
    let failed = |error: caps::errors::CapsError| io::Error::other(format!("capabilities: {error}"));
    // Only who has the right to may empty the bounding set; who has not gains nothing by a program's rights either.
    if caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SETPCAP).unwrap_or(false) {
        caps::clear(None, caps::CapSet::Bounding).map_err(failed)?;
    }
    if let Some(user) = user {
        setgroups(&[]).map_err(|e| told("groups")(e.into()))?;
        let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
        setresgid(gid, gid, gid).map_err(|e| told("group")(e.into()))?;
        setresuid(uid, uid, uid).map_err(|e| told("user")(e.into()))?;
    }
    for set in [caps::CapSet::Ambient, caps::CapSet::Inheritable, caps::CapSet::Effective, caps::CapSet::Permitted] {
        caps::clear(None, set).map_err(failed)?;
    }
    Ok(())
}

fn limit(plan: &Plan, user: Option<u32>) -> io::Result<()> {
    let limits = &plan.limits;
    let cpu_secs = limits.wall_secs.ceil() as u64 + 1;
    // A user of its own has no other processes; else those that it has count as well.
    let others = if user.is_some() { 0 } else { tree::threads_of_user(Path::new("/proc"), Uid::current().as_raw()) };
    for (resource, most) in [
        (Resource::RLIMIT_CPU, cpu_secs),
        (Resource::RLIMIT_DATA, limits.memory_bytes),
        (Resource::RLIMIT_NPROC, limits.processes + others),
        (Resource::RLIMIT_FSIZE, limits.file_bytes),
        (Resource::RLIMIT_NOFILE, OPEN_FILES),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MEMLOCK, 0),
        (Resource::RLIMIT_MSGQUEUE, 0),
    ] {
        setrlimit(resource, most, most).map_err(|e| told(&format!("{resource:?}"))(e.into()))?;
    }
    Ok(())
}
