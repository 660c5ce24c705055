// Streams, events and captured graphs. Work that is queued on a stream is done when somebody waits for that stream, or for an
// event in it, and not before: what is read or written too early shows, and so does a stream that should wait for another.

#include "driver.hpp"

#include <deque>
#include <memory>
#include <set>
#include <thread>
#include <vector>

namespace emulator {

struct Capture {
    std::thread::id thread;
    bool is_broken = false;
    std::vector<Work> work;
};

struct Stream {
    // Held while work is done.
    std::mutex running;
    std::deque<Work> work;
    // How much was queued, and done, ever.
    u64 queued = 0, done = 0;
    std::unique_ptr<Capture> capture;
};

// All that was queued on a stream when the event was recorded.
struct Event {
    Stream* stream = nullptr;
    u64 queued = 0;
};

struct Graph {
    std::shared_ptr<const std::vector<Work>> work;
};

std::mutex lock;
thread_local bool context_is_current = false;

namespace {

enum CaptureMode { ThreadLocal = 1 };

// Never destroyed: threads may still give things back while the process ends.
std::set<Stream*>& streams = *new std::set<Stream*>;
std::set<Event*>& events = *new std::set<Event*>;
std::set<Graph*>& graphs = *new std::set<Graph*>;
std::set<Graph*>& executables = *new std::set<Graph*>;
thread_local Stream* capturing = nullptr;

void run_until(Stream& stream, u64 queued) {
    const std::lock_guard<std::mutex> running(stream.running);
    for (;;) {
        Work next;
        {
            const std::lock_guard<std::mutex> guard(lock);
            if (stream.done >= queued) return;
            next = std::move(stream.work.front());
            stream.work.pop_front();
        }
        next();
        const std::lock_guard<std::mutex> guard(lock);
        stream.done++;
    }
}

void finish(Stream& stream) {
    u64 queued;
    {
        const std::lock_guard<std::mutex> guard(lock);
        queued = stream.queued;
    }
    run_until(stream, queued);
}

int append(Stream& stream, Work work) {
    if (stream.capture) {
        if (stream.capture->is_broken) return CaptureInvalidated;
        stream.capture->work.push_back(std::move(work));
    } else {
        stream.work.push_back(std::move(work));
        stream.queued++;
    }
    return Success;
}

int refuse(Stream& stream, Result result) {
    stream.capture->is_broken = true;
    return result;
}

template <typename T>
int destroy(std::set<T*>& all, T* one) {
    const std::lock_guard<std::mutex> guard(lock);
    if (all.erase(one) == 0) return InvalidValue;
    delete one;
    return Success;
}

}  // namespace

int queue(Stream* stream, Work work) {
    const std::lock_guard<std::mutex> guard(lock);
    if (!context_is_current) return InvalidContext;
    if (streams.count(stream) == 0) return InvalidValue;
    return append(*stream, std::move(work));
}

void finish_all() {
    std::vector<Stream*> all;
    {
        const std::lock_guard<std::mutex> guard(lock);
        all.assign(streams.begin(), streams.end());
    }
    for (Stream* stream : all) finish(*stream);
}

bool breaks_capture() {
    const std::lock_guard<std::mutex> guard(lock);
    if (capturing) capturing->capture->is_broken = true;
    return capturing != nullptr;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

int cuStreamCreate(Stream** stream, unsigned) {
    const std::lock_guard<std::mutex> guard(lock);
    if (!context_is_current) return InvalidContext;
    *stream = new Stream;
    streams.insert(*stream);
    return Success;
}

int cuStreamSynchronize(Stream* stream) {
    {
        const std::lock_guard<std::mutex> guard(lock);
        if (streams.count(stream) == 0) return InvalidValue;
        if (stream->capture) return refuse(*stream, CaptureUnsupported);
    }
    if (breaks_capture()) return CaptureUnsupported;
    finish(*stream);
    return Success;
}

// Its memory stays: another thread may be about to wait for the whole device.
int cuStreamDestroy_v2(Stream* stream) {
    finish(*stream);
    return Success;
}

int cuEventCreate(Event** event, unsigned) {
    const std::lock_guard<std::mutex> guard(lock);
    if (!context_is_current) return InvalidContext;
    *event = new Event;
    events.insert(*event);
    return Success;
}

int cuEventDestroy_v2(Event* event) { return destroy(events, event); }

// Within a capture events would mean something else, which nobody asks for.
int cuEventRecord(Event* event, Stream* stream) {
    const std::lock_guard<std::mutex> guard(lock);
    if (!context_is_current) return InvalidContext;
    if (events.count(event) == 0 || streams.count(stream) == 0) return InvalidValue;
    if (stream->capture) return refuse(*stream, CaptureUnsupported);
    *event = {stream, stream->queued};
    return Success;
}

// For what the event holds now, whenever it is recorded again.
int cuStreamWaitEvent(Stream* stream, Event* event, unsigned flags) {
    const std::lock_guard<std::mutex> guard(lock);
    if (!context_is_current) return InvalidContext;
    if (events.count(event) == 0 || streams.count(stream) == 0 || flags != 0) return InvalidValue;
    if (stream->capture) return refuse(*stream, CaptureIsolation);
    const Event recorded = *event;
    if (recorded.stream == nullptr || recorded.stream == stream) return Success;
    return append(*stream, [=] { run_until(*recorded.stream, recorded.queued); });
}

int cuEventSynchronize(Event* event) {
    Event recorded;
    {
        const std::lock_guard<std::mutex> guard(lock);
        if (events.count(event) == 0) return InvalidValue;
        recorded = *event;
    }
    if (breaks_capture()) return CaptureUnsupported;
    if (recorded.stream) run_until(*recorded.stream, recorded.queued);
    return Success;
}

int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    const std::lock_guard<std::mutex> guard(lock);
    if (!context_is_current) return InvalidContext;
    if (streams.count(stream) == 0 || mode != ThreadLocal || stream->capture || capturing) return InvalidValue;
    stream->capture.reset(new Capture);
    stream->capture->thread = std::this_thread::get_id();
    capturing = stream;
    return Success;
}

int cuStreamEndCapture(Stream* stream, Graph** graph) {
    const std::lock_guard<std::mutex> guard(lock);
    *graph = nullptr;
    if (streams.count(stream) == 0) return InvalidValue;
    if (!stream->capture) return IllegalState;
    if (stream->capture->thread != std::this_thread::get_id()) return refuse(*stream, CaptureWrongThread);
    const std::unique_ptr<Capture> capture = std::move(stream->capture);
    capturing = nullptr;
    if (capture->is_broken) return CaptureInvalidated;
    *graph = new Graph{std::make_shared<const std::vector<Work>>(std::move(capture->work))};
    graphs.insert(*graph);
    return Success;
}

int cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, u64 flags) {
    if (breaks_capture()) return CaptureUnsupported;
    const std::lock_guard<std::mutex> guard(lock);
    if (!context_is_current) return InvalidContext;
    if (graphs.count(graph) == 0 || flags != 0) return InvalidValue;
    *executable = new Graph(*graph);
    executables.insert(*executable);
    return Success;
}

int cuGraphLaunch(Graph* executable, Stream* stream) {
    const std::lock_guard<std::mutex> guard(lock);
    if (!context_is_current) return InvalidContext;
    if (executables.count(executable) == 0 || streams.count(stream) == 0) return InvalidValue;
    if (stream->capture) return refuse(*stream, CaptureUnsupported);
    // The work outlives a graph that is destroyed before it is done.
    const auto work = executable->work;
    return append(*stream, [=] {
        for (const Work& one : *work) one();
    });
}

int cuGraphDestroy(Graph* graph) { return destroy(graphs, graph); }

int cuGraphExecDestroy(Graph* executable) { return destroy(executables, executable); }

}
