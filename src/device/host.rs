//! The host's memory, as Linux says it.

use std::path::{Path, PathBuf};

/// Bytes of the host's memory that this process may still take: what the system has available, and what is left of each limit that
/// its control groups have (Slurm and containers set such). `None` where the system does not say it.
pub fn free_host_memory() -> Option<u64> {
    let available = available(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Some(groups(&own, Path::new("/sys/fs/cgroup")).iter().filter_map(|folder| left(folder)).fold(available, u64::min))
}

/// The folders of a process's control groups and of those they are in, of which the second version has one tree and the first a
/// tree for memory.
fn groups(own: &str, root: &Path) -> Vec<PathBuf> {
    let of_line = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, group) = rest.split_once(':')?;
        let tree = if controllers.is_empty() { root.to_path_buf() } else { root.join("memory") };
        let is_one = controllers.is_empty() || controllers.split(',').any(|name| name == "memory");
        let group = group.trim_start_matches('/');
        is_one.then(|| (tree.clone(), if group.is_empty() { tree } else { tree.join(group) }))
    };
    let chains = own.lines().filter_map(of_line).flat_map(|(tree, folder)| {
        let chain: Vec<PathBuf> =
            folder.ancestors().take_while(|folder| folder.starts_with(&tree)).map(Path::to_path_buf).collect();
        chain
    });
    chains.collect()
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What a control group has left; files that it has read make way.
fn left(folder: &Path) -> Option<u64> {
    let number =
        |name: &str| std::fs::read_to_string(PathBuf::from(folder).join(name)).ok()?.trim().parse::<u64>().ok();
    let statistics = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let of = |name: &str| statistics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let cached = of("total_inactive_file ").or_else(|| of("inactive_file ")).unwrap_or(0);
    let most = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let taken = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    Some(most.saturating_sub(taken.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_those_of_memory_and_all_above_them() {
        let names = |text: &str| -> Vec<String> {
            groups(text, Path::new("/g")).iter().map(|folder| folder.display().to_string()).collect()
        };
        assert_eq!(names("0::/job/step\n"), ["/g/job/step", "/g/job", "/g"]);
        let first = "9:pids:/\n5:cpu,cpuacct:/x\n4:memory:/slurm/job\n";
        assert_eq!(names(first), ["/g/memory/slurm/job", "/g/memory/slurm", "/g/memory"]);
        assert_eq!(names("4:memory:/\n0::/\n"), ["/g/memory", "/g"]);
        assert_eq!(names("").len(), 0);
    }

    #[test]
    fn limits_count_where_they_are_set() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:    1234 kB\n"), Some(1234 << 10));
        assert_eq!(available("MemTotal:  9 kB\n"), None);
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(left(folder.path()), None);
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "700\n");
        assert_eq!(left(folder.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(left(folder.path()), Some(300));
        write("memory.stat", "anon 600\ninactive_file 100\n");
        assert_eq!(left(folder.path()), Some(400));
        std::fs::remove_file(folder.path().join("memory.max")).unwrap();
        assert_eq!(left(folder.path()), None);
        write("memory.limit_in_bytes", "2000\n");
        write("memory.usage_in_bytes", "900\n");
        std::fs::remove_file(folder.path().join("memory.current")).unwrap();
        write("memory.stat", "inactive_file 1\ntotal_inactive_file 300\n");
        assert_eq!(left(folder.path()), Some(1400));
        assert!(free_host_memory().map_or(cfg!(not(target_os = "linux")), |bytes| bytes > 0));
    }
}
