//! Steps that were recorded: one of the same shape is asked for as a whole instead of kernel by kernel.

use std::sync::Arc;

use dormouse_kernels::cuda::{CudaError, Gpu, Graph};

/// Shapes that are kept, each with its graphs; the least recently used one makes room.
const MOST_SHAPES: usize = 48;

/// All that the kernels of a step and their arguments depend on, besides memory's addresses. What else is new in a step lies in
/// its inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Of each sequence.
    pub rows: Vec<usize>,
    pub logit_rows: usize,
    /// Whether these are looked through on the device.
    pub likeliest: bool,
    /// Segments that attention has blocks for.
    pub segments: usize,
}

/// The graphs of a shape: one of each stretch that nothing on the host interrupts.
type Stretches = Vec<Graph>;

pub(super) struct Graphs {
    /// The most recently used one is last. A shape that came once has no graphs yet.
    known: Vec<(Shape, Option<Stretches>)>,
    /// The driver cannot record.
    are_off: bool,
    /// Passes that were launched from graphs.
    pub replays: u64,
}

/// How the stretches of a pass are done.
pub(super) enum Way {
    /// Kernel by kernel.
    Plain(Option<Shape>),
    Record(Shape, Stretches),
    Replay(Shape, Stretches, usize),
    /// Recording failed: the rest is done kernel by kernel.
    Failed,
}

impl Graphs {
    pub fn new() -> Graphs {
        Graphs { known: Vec::new(), are_off: false, replays: 0 }
    }

    /// The way of a pass, all memory of which is taken. With `shape`: kernel by kernel the first time, since drivers may load a
    /// kernel when it is first started and cannot while they record; recorded the second time; from then on from graphs.
    pub fn begin(&mut self, shape: Option<Shape>) -> Way {
        // Where something made room or moved, graphs may name what is no longer theirs.
        self.known.retain(|(_, stretches)| stretches.iter().flatten().all(Graph::is_current));
        let Some(shape) = shape.filter(|_| !self.are_off) else { return Way::Plain(None) };
        let Some(at) = self.known.iter().position(|(known, _)| *known == shape) else {
            return Way::Plain(Some(shape));
        };
        match self.known.remove(at) {
            (shape, Some(stretches)) => Way::Replay(shape, stretches, 0),
            (shape, None) => Way::Record(shape, Vec::new()),
        }
    }

    /// Keeps what a pass that succeeded recorded or used. Of one that failed nothing is kept.
    pub fn end(&mut self, way: Way) {
        let known = match way {
            Way::Plain(None) => return,
            Way::Failed => {
                self.are_off = true;
                self.known.clear();
                return;
            }
            Way::Plain(Some(shape)) => (shape, None),
            Way::Record(shape, stretches) => (shape, Some(stretches)),
            Way::Replay(shape, stretches, _) => {
                self.replays += 1;
                (shape, Some(stretches))
            }
        };
        if self.known.len() == MOST_SHAPES {
            self.known.remove(0);
        }
        self.known.push(known);
    }
}

impl Way {
    /// Does `work`, which asks the device for things and neither waits nor takes memory, or asks for what was recorded of it.
    ///
    /// # Safety
    /// What `work` names was there when the pass began and is until the device has been waited for. `work` is that of the same
    /// stretch of every pass of this shape, in the same memory, unless memory was given back since.
    pub unsafe fn stretch(
        &mut self,
        gpu: &Arc<Gpu>,
        work: &mut dyn FnMut() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        match self {
            Way::Plain(_) | Way::Failed => work(),
            Way::Record(_, stretches) => match gpu.record(&mut *work) {
                Ok(graph) => {
                    // SAFETY: what was recorded just now is there, as the caller promises.
                    unsafe { graph.launch()? };
                    stretches.push(graph);
                    Ok(())
                }
                Err(error) => {
                    tracing::warn!(%error, "a step cannot be recorded: kernels are launched one by one from now on");
                    *self = Way::Failed;
                    work()
                }
            },
            Way::Replay(_, stretches, next) => {
                *next += 1;
                // SAFETY: the caller's promise; graphs that were not current when the pass began were dropped.
                unsafe { stretches[*next - 1].launch() }
            }
        }
    }
}

/// They need a device, or the emulated one that `scripts/check_cuda` brings along.
#[cfg(test)]
mod tests {
    use dormouse_kernels::cuda::DeviceBuffer;

    use super::*;

    fn gpu() -> Arc<Gpu> {
        Gpu::open(0)
            .unwrap_or_else(|error| panic!("{error}; scripts/check_cuda runs these tests without a device"))
    }

    fn shape(rows: usize) -> Option<Shape> {
        Some(Shape { rows: vec![1; rows], logit_rows: rows, likeliest: false, segments: 1 })
    }

    /// One pass of one stretch.
    fn pass(
        graphs: &mut Graphs,
        gpu: &Arc<Gpu>,
        shape: Option<Shape>,
        work: &mut dyn FnMut() -> Result<(), CudaError>,
    ) {
        let mut way = graphs.begin(shape);
        // SAFETY: the tests' memory stays, and every shape has the same work.
        unsafe { way.stretch(gpu, work).unwrap() };
        gpu.wait().unwrap();
        graphs.end(way);
    }

    #[test]
    fn the_third_step_of_a_shape_is_the_first_that_is_replayed_and_memory_that_is_given_back_begins_anew() {
        let (gpu, mut graphs) = (gpu(), Graphs::new());
        let x = DeviceBuffer::of(&gpu, &[1.0f32], "a test").unwrap();
        let mut asked = 0;
        let mut work = || {
            asked += 1;
            gpu.scale(x.span(), 2.0)
        };
        for replays in [0, 0, 1, 2] {
            pass(&mut graphs, &gpu, shape(1), &mut work);
            assert_eq!(graphs.replays, replays);
        }
        drop(DeviceBuffer::<u8>::new(&gpu, 1, "a test").unwrap());
        for replays in [2, 2, 3] {
            pass(&mut graphs, &gpu, shape(1), &mut work);
            assert_eq!(graphs.replays, replays);
        }
        pass(&mut graphs, &gpu, None, &mut work);
        assert_eq!((asked, graphs.replays), (5, 3));
    }

    #[test]
    fn the_shapes_that_were_used_longest_ago_make_room() {
        let (gpu, mut graphs) = (gpu(), Graphs::new());
        let x = DeviceBuffer::of(&gpu, &[1.0f32], "a test").unwrap();
        let mut work = || gpu.scale(x.span(), 2.0);
        for rows in [1, 1].into_iter().chain(2..=MOST_SHAPES) {
            pass(&mut graphs, &gpu, shape(rows), &mut work);
        }
        pass(&mut graphs, &gpu, shape(1), &mut work);
        pass(&mut graphs, &gpu, shape(MOST_SHAPES + 1), &mut work);
        assert_eq!((graphs.known.len(), graphs.replays), (MOST_SHAPES, 1));
        let is_known = |rows| graphs.known.iter().any(|(known, _)| Some(known) == shape(rows).as_ref());
        assert!(is_known(1) && !is_known(2) && is_known(3));
    }

    #[test]
    fn a_driver_that_cannot_record_computes_kernel_by_kernel() {
        let (gpu, mut graphs) = (gpu(), Graphs::new());
        let mut done = 0;
        // Waiting is what no driver records.
        let mut work = || gpu.wait().map(|()| done += 1);
        (0..4).for_each(|_| pass(&mut graphs, &gpu, shape(1), &mut work));
        assert_eq!((done, graphs.replays, graphs.known.len()), (4, 0, 0));
    }
}
