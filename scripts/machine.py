"""What this machine can do: read bandwidth of memory, rate of multiply-adds, and what it is called."""

import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time

SECONDS = 0.5  # of reading or multiplying in one round
ROUNDS = 3  # the best one counts: what the machine can do, not what it did while something else ran
READ_BYTES = 512 << 20  # in all, well above any cache that we know of
SIDE = 1024  # of the square matrices that are multiplied: 4 MiB each, so that the caches hold their tiles


def _reader(barrier, results, threads):
    import numpy as np

    values = np.full(READ_BYTES // threads // 4, 1e-3, np.float32)
    # Three ways to touch every byte once; which one a core does fastest differs.
    words = values.view(np.uint64)
    ways = [lambda: np.dot(values, values), lambda: values.max(), lambda: np.bitwise_or.reduce(words)]
    _rounds(barrier, results, [(way, values.nbytes) for way in ways])


def _multiplier(barrier, results, threads):
    import numpy as np

    left, right = np.full((2, SIDE, SIDE), 0.5, np.float32)
    product = np.empty_like(left)
    _rounds(barrier, results, [(lambda: np.dot(left, right, product), SIDE**3)])


def _rounds(barrier, results, ways):
    rates = []
    for way, amount in ways:
        way()
        for _ in range(ROUNDS):
            barrier.wait()
            begun, times = time.perf_counter(), 0
            while (passed := time.perf_counter() - begun) < SECONDS:
                way()
                times += 1
            rates.append(times * amount / passed)
    results.put(rates)


def _best(worker, threads: int) -> float:
    """The rates of `threads` processes that work at the same time, added up; the best round."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # one thread in each process
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(threads), context.Queue()
    processes = [context.Process(target=worker, args=(barrier, results, threads)) for _ in range(threads)]
    for process in processes:
        process.start()
    rates = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return max(map(sum, zip(*rates)))


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` processes read from memory together (numpy over arrays beyond the caches)."""
    return _best(_reader, threads)


def multiply_rate(threads: int) -> float:
    """f32 multiply-adds per second of `threads` processes together (numpy's matrix product)."""
    return _best(_multiplier, threads)


class Watch:
    """How much of the cores processes other than this one and its children use while it goes on (Linux; else nothing)."""

    def __init__(self):
        self.begun, self.busy, self.own = time.monotonic(), _busy_s(), _own_s()

    def others_share(self) -> float | None:
        """Of all cores, since it was made; this process's children must have ended. 0.5: half of them were taken."""
        if self.busy is None:
            return None
        others = (_busy_s() - self.busy) - (_own_s() - self.own)
        return max(0.0, others / (time.monotonic() - self.begun) / os.cpu_count())


def _busy_s() -> float | None:
    """Seconds that all cores together have worked, or were taken by the host of this virtual machine."""
    if sys.platform != "linux":
        return None
    with open("/proc/stat") as file:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def describe() -> dict:
    """Name of the processor, its vector instructions, cores and memory."""
    name, flags, memory_kib = platform.processor() or platform.machine(), set(), 0
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            fields = dict(map(str.strip, line.split(":", 1)) for line in file if ":" in line)
        name, flags = fields.get("model name", name), set(fields.get("flags", "").split())
        with open("/proc/meminfo") as file:
            memory_kib = int(next(line for line in file if line.startswith("MemTotal:")).split()[1])
    elif sys.platform == "darwin":
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    known = ["avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp"]
    return {
        "processor": name,
        "vector_instructions": [flag for flag in known if flag in flags],
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
    }


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count()
    print(describe())
    print(f"{count} threads: read {read_bandwidth(count) / 1e9:.1f} GB/s, f32 {multiply_rate(count) / 1e9:.0f} GMAC/s")
