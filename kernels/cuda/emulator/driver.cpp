// The functions of the CUDA driver that the back end calls, over host memory: devices, memory, copies and kernels.

#include "driver.hpp"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

using namespace emulator;

namespace {

enum FunctionAttribute { MaxDynamicSharedSizeBytes = 8 };
enum Attribute { MultiprocessorCount = 16, ComputeMajor = 75, ComputeMinor = 76 };

constexpr size_t PAGE = 4096;
constexpr size_t ALIGNMENT = 256;
// Dynamic shared memory of a block: without asking, and where the function was told that it may be more, what every device of
// compute capability 8.0 to 9.0 has.
constexpr int SHARED_WITHOUT_ASKING = 48 << 10, SHARED_MOST = 99 << 10;
// Fresh memory holds no numbers, so that what is read before it is written shows; of large pieces that would take too long.
constexpr size_t FILLED_MOST = 16 << 20;

struct Allocation {
    void* mapping;
    size_t mapped_bytes, bytes;
};

// Never destroyed: threads may still give memory back while the process ends.
std::map<u64, Allocation>& allocations = *new std::map<u64, Allocation>;
std::map<const emulator::Kernel*, int>& shared_most = *new std::map<const emulator::Kernel*, int>;
size_t used_bytes = 0;

size_t total_bytes() {
    const char* text = getenv("DORMOUSE_EMULATED_DEVICE_BYTES");
    return text ? strtoull(text, nullptr, 10) : size_t{4} << 30;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return Success; }

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return Success;
}

int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case Success: *name = "CUDA_SUCCESS"; break;
        case InvalidValue: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case OutOfMemory: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case InvalidDevice: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case InvalidContext: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case IllegalState: *name = "CUDA_ERROR_ILLEGAL_STATE"; break;
        case NotFound: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case CaptureUnsupported: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case CaptureInvalidated: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
        case CaptureIsolation: *name = "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"; break;
        case CaptureWrongThread: *name = "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"; break;
        default: return InvalidValue;
    }
    return Success;
}

int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

int cuDeviceGetCount(int* count) {
    *count = 1;
    return Success;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = 0;
    return ordinal == 0 ? Success : InvalidDevice;
}

int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, static_cast<size_t>(length), "emulated device");
    return Success;
}

int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = total_bytes();
    return Success;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case MultiprocessorCount: *value = 4; return Success;
        case ComputeMajor: *value = 8; return Success;
        case ComputeMinor: *value = 0; return Success;
        default: return InvalidValue;
    }
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    static char the_context;
    *context = &the_context;
    return Success;
}

int cuDevicePrimaryCtxRelease_v2(int) { return Success; }

int cuCtxSetCurrent(void* context) {
    context_is_current = context != nullptr;
    return Success;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    const std::lock_guard<std::mutex> guard(lock);
    *total = total_bytes();
    *free = *total - used_bytes;
    return Success;
}

int cuMemAlloc_v2(u64* at, size_t bytes) {
    if (breaks_capture()) return CaptureUnsupported;
    const std::lock_guard<std::mutex> guard(lock);
    if (!context_is_current) return InvalidContext;
    if (bytes == 0) return InvalidValue;
    if (bytes > total_bytes() - used_bytes) return OutOfMemory;
    // The memory ends where a page begins that nobody may touch.
    const size_t padded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const size_t whole = (padded + PAGE - 1) / PAGE * PAGE;
    char* mapping = static_cast<char*>(
        mmap(nullptr, whole + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapping == MAP_FAILED) return OutOfMemory;
    mprotect(mapping + whole, PAGE, PROT_NONE);
    char* start = mapping + whole - padded;
    if (bytes <= FILLED_MOST) memset(start, 0xff, bytes);
    *at = reinterpret_cast<u64>(start);
    allocations[*at] = {mapping, whole + PAGE, bytes};
    used_bytes += bytes;
    return Success;
}

int cuMemFree_v2(u64 at) {
    if (breaks_capture()) return CaptureUnsupported;
    finish_all();
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = allocations.find(at);
    if (found == allocations.end()) return InvalidValue;
    munmap(found->second.mapping, found->second.mapped_bytes);
    used_bytes -= found->second.bytes;
    allocations.erase(found);
    return Success;
}

int cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    if (breaks_capture()) return CaptureUnsupported;
    *at = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    return *at ? Success : OutOfMemory;
}

int cuMemFreeHost(void* at) {
    if (breaks_capture()) return CaptureUnsupported;
    finish_all();
    free(at);
    return Success;
}

int cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, Stream* stream) {
    return queue(stream, [=] { memcpy(reinterpret_cast<void*>(to), from, bytes); });
}

int cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, Stream* stream) {
    return queue(stream, [=] { memcpy(to, reinterpret_cast<const void*>(from), bytes); });
}

int cuMemsetD8Async(u64 to, unsigned char value, size_t bytes, Stream* stream) {
    return queue(stream, [=] { memset(reinterpret_cast<void*>(to), value, bytes); });
}

// Whatever the image holds: the kernels are those that are compiled into this library.
int cuModuleLoadData(void** module, const void*) {
    if (breaks_capture()) return CaptureUnsupported;
    static char the_module;
    *module = &the_module;
    return Success;
}

int cuModuleUnload(void*) { return Success; }

int cuModuleGetFunction(const emulator::Kernel** function, void*, const char* name) {
    *function = emulator::find_kernel(name);
    return *function ? Success : NotFound;
}

int cuFuncSetAttribute(const emulator::Kernel* kernel, int attribute, int value) {
    if (attribute != MaxDynamicSharedSizeBytes || value < 0 || value > SHARED_MOST) return InvalidValue;
    const std::lock_guard<std::mutex> guard(lock);
    shared_most[kernel] = value;
    return Success;
}

int cuLaunchKernel(const emulator::Kernel* kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared_bytes, Stream* stream, void** parameters, void**) {
    if (x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535) return InvalidValue;
    {
        const std::lock_guard<std::mutex> guard(lock);
        const auto told = shared_most.find(kernel);
        const int most = told == shared_most.end() ? SHARED_WITHOUT_ASKING : told->second;
        if (shared_bytes > static_cast<unsigned>(most)) return InvalidValue;
    }
    const char* bytes = static_cast<const char*>(parameters[0]);
    const std::vector<char> arguments(bytes, bytes + kernel->argument_bytes);
    return queue(stream, [=] { emulator::run(*kernel, arguments.data(), {x, y, z}, threads, shared_bytes); });
}

}
