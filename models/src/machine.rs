//! What the operating system says of this machine.

/// Memory in bytes: what there is, and what programs may still take without others being pushed to disk. 0 where the system does
/// not say.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub total: u64,
    pub available: u64,
}

impl Memory {
    /// That of this machine, or of the container that this process is kept in, if it has less.
    pub fn here() -> Memory {
        system::memory()
    }
}

/// What the processor calls itself, where the system knows: ARM's under Linux have no name.
pub fn processor_name() -> Option<String> {
    system::processor_name()
}

#[cfg(not(target_vendor = "apple"))]
mod system {
    use std::fs::read_to_string;

    use super::Memory;

    pub fn memory() -> Memory {
        let system = rustix::system::sysinfo();
        let unit = u64::from(system.mem_unit);
        let (total, free) =
            ((system.totalram as u64).saturating_mul(unit), (system.freeram as u64).saturating_mul(unit));
        let available = read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
        let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
        let limit = limits.into_iter().find_map(|path| read_to_string(path).ok()?.trim().parse().ok());
        let limit = limit.unwrap_or(u64::MAX);
        Memory { total: total.min(limit), available: available.unwrap_or(free).min(limit) }
    }

    /// The line `MemAvailable:  123 kB` of `/proc/meminfo`, in bytes.
    fn mem_available(text: &str) -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }

    pub fn processor_name() -> Option<String> {
        let text = read_to_string("/proc/cpuinfo").ok()?;
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_string())
    }

    #[test]
    fn available_memory_is_a_line_of_many() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:    3 kB\n"), Some(3072));
        assert_eq!(mem_available("MemTotal: 9 kB\n"), None);
    }
}

/// macOS. It compiles; nobody has run it yet.
#[cfg(target_vendor = "apple")]
mod system {
    use std::ffi::CStr;

    use super::Memory;

    pub fn memory() -> Memory {
        let total = number(c"hw.memsize").unwrap_or(0);
        // What Linux calls available: free pages, and those that are given up without writing them anywhere.
        let kinds = [c"vm.page_free_count", c"vm.page_pageable_external_count", c"vm.page_purgeable_count"];
        let pages: u64 = kinds.into_iter().filter_map(number).sum();
        Memory { total, available: pages.saturating_mul(rustix::param::page_size() as u64).min(total) }
    }

    pub fn processor_name() -> Option<String> {
        let bytes = value(c"machdep.cpu.brand_string")?;
        Some(CStr::from_bytes_until_nul(&bytes).ok()?.to_str().ok()?.trim().to_string())
    }

    /// Numbers have four bytes or eight.
    fn number(name: &CStr) -> Option<u64> {
        let bytes = value(name)?;
        let short = || Some(u64::from(u32::from_ne_bytes(bytes.as_slice().try_into().ok()?)));
        bytes.as_slice().try_into().ok().map(u64::from_ne_bytes).or_else(short)
    }

    fn value(name: &CStr) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 256];
        let mut len = bytes.len();
        let nothing = std::ptr::null_mut();
        // SAFETY: `name` ends with NUL, at most `len` bytes are written to `bytes`, and nothing is set.
        let outcome =
            unsafe { libc::sysctlbyname(name.as_ptr(), bytes.as_mut_ptr().cast(), &mut len, nothing, 0) };
        bytes.truncate(len);
        (outcome == 0).then_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory() {
        let memory = Memory::here();
        assert!(memory.total > 1 << 20 && memory.available > 0 && memory.available <= memory.total);
    }
}
