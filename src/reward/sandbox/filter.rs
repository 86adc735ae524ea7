//! System calls that a program in a sandbox may not make.
//!
//! A list of what is refused, not of what is allowed: programs of many languages run here, and what keeps them in is
//! the namespaces and the missing rights. The filter takes away what has often been a way out (new namespaces, mounts,
//! tracing, kernel keys, `io_uring`, `bpf`) and, where there is no network namespace, sockets.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Refused with "operation not permitted", whatever the arguments.
const REFUSED: &[c_long] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_syslog,
    libc::SYS_quotactl,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_personality,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_mbind,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
];
/// Refused as well where the machine's processes are in reach: signals to others.
const SIGNALS: &[c_long] = &[
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_pidfd_send_signal,
    libc::SYS_pidfd_open,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_setpriority,
    libc::SYS_sched_setaffinity,
];
/// Refused as if the system did not have it, so that libraries fall back to `clone`, whose flags can be seen.
const UNKNOWN: &[c_long] = &[libc::SYS_clone3];
/// The bit that marks the x32 form of a call, a second door to the same room.
#[cfg(target_arch = "x86_64")]
const X32: c_long = 0x4000_0000;
/// Flags of `clone` that make namespaces.
const NEW_NAMESPACES: c_long = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as c_long;

/// Applies the filter to this process and all it will start. `is_alone`: it has namespaces of its own.
pub(super) fn apply(is_alone: bool) -> io::Result<()> {
    let failed = |error: &dyn std::fmt::Display| io::Error::other(format!("system call filter: {error}"));
    let mut refused: BTreeMap<c_long, Vec<SeccompRule>> = BTreeMap::new();
    let mut refuse = |call: c_long, rules: Vec<SeccompRule>| {
        #[cfg(target_arch = "x86_64")]
        refused.insert(call | X32, rules.clone());
        refused.insert(call, rules);
    };
    for &call in REFUSED {
        refuse(call, Vec::new());
    }
    if !is_alone {
        // Pairs of connected sockets stay: they reach nobody else.
        for &call in SIGNALS.iter().chain(&[libc::SYS_socket]) {
            refuse(call, Vec::new());
        }
    }
    let flag = |bit: c_long| {
        let bit = bit as u64;
        SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(bit), bit)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(|error| failed(&error))
    };
    let bits = (0..32).map(|shift| 1 << shift).filter(|bit| NEW_NAMESPACES & bit != 0);
    refuse(libc::SYS_clone, bits.map(flag).collect::<io::Result<_>>()?);
    for (calls, errno) in [(refused, libc::EPERM), (all(UNKNOWN), libc::ENOSYS)] {
        let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| failed(&error))?;
        let action = SeccompAction::Errno(errno as u32);
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, action, architecture).map_err(|e| failed(&e))?;
        let program = BpfProgram::try_from(filter).map_err(|error| failed(&error))?;
        seccompiler::apply_filter(&program).map_err(|error| failed(&error))?;
    }
    Ok(())
}

fn all(calls: &[c_long]) -> BTreeMap<c_long, Vec<SeccompRule>> {
    calls.iter().map(|&call| (call, Vec::new())).collect()
}
