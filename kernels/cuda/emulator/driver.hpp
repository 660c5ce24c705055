// What the parts of the emulated driver share.
#pragma once

#include "../common.cuh"

#include <functional>
#include <mutex>

namespace emulator {

enum Result {
    Success = 0,
    InvalidValue = 1,
    OutOfMemory = 2,
    InvalidDevice = 101,
    InvalidContext = 201,
    IllegalState = 401,
    NotFound = 500,
    CaptureUnsupported = 900,
    CaptureInvalidated = 901,
    CaptureIsolation = 905,
    CaptureWrongThread = 908,
};

struct Stream;
using Work = std::function<void()>;

// Of all that the driver's functions keep.
extern std::mutex lock;
extern thread_local bool context_is_current;

// Leaves work to be done by the stream, or to be recorded where the stream captures.
int queue(Stream* stream, Work work);
// What waits for the whole device.
void finish_all();
// Whether this thread captures, when it may not do what is no work of a stream. The capture is broken then.
bool breaks_capture();

}  // namespace emulator
