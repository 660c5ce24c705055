use super::*;

#[test]
fn recorded_work_is_done_when_it_is_launched_with_what_memory_holds_then() {
    let gpu = gpu();
    let (x, other) = (on_device(&gpu, &[1.0f32, 2.0]), on_device(&gpu, &[10.0f32, 20.0]));
    let graph = gpu.record(|| gpu.add_scaled(x.span(), other.span(), 2.0)).unwrap();
    assert_eq!(read(&gpu, x.span()), [1.0, 2.0], "nothing runs while it is recorded");
    // SAFETY: both buffers are there.
    unsafe { graph.launch().unwrap() };
    assert_eq!(read(&gpu, x.span()), [21.0, 42.0]);
    other.span().part(0..1).clear(&gpu).unwrap();
    for expected in [[21.0, 82.0], [21.0, 122.0]] {
        // SAFETY: as above.
        unsafe { graph.launch().unwrap() };
        assert_eq!(read(&gpu, x.span()), expected);
    }
}

#[test]
fn copies_are_recorded_too_and_a_graph_may_go_before_its_work_is_done() {
    let gpu = gpu();
    let x = on_device(&gpu, &[1u32, 2, 3]);
    let mut host = Pinned::new(&gpu, 3).unwrap();
    // SAFETY: the host's memory is looked at after waiting for the launch.
    let graph = gpu.record(|| unsafe { x.span().copy_out(&gpu, &mut host) }).unwrap();
    gpu.wait().unwrap();
    assert_eq!(host.as_slice(), [0, 0, 0]);
    // SAFETY: both ends of the copy are there.
    unsafe { graph.launch().unwrap() };
    drop(graph);
    gpu.wait().unwrap();
    assert_eq!(host.as_slice(), [1, 2, 3]);
}

#[test]
fn what_cannot_be_recorded_is_an_error_and_the_device_computes_afterwards() {
    let gpu = gpu();
    let x = on_device(&gpu, &[1.0f32]);
    let why = |recorded: Result<Graph, CudaError>| recorded.err().unwrap().to_string();
    assert!(why(gpu.record(|| gpu.wait())).contains("cuStreamSynchronize"), "waiting");
    let taken = gpu.record(|| DeviceBuffer::<u8>::new(&gpu, 1, "a test").map(drop));
    assert!(why(taken).contains("cuMemAlloc_v2"), "device memory");
    let taken = gpu.record(|| Pinned::<u8>::new(&gpu, 1).map(drop));
    assert!(why(taken).contains("cuMemHostAlloc"), "the host's memory");
    let within = gpu.record(|| gpu.record(|| Ok(())).map(drop));
    assert!(why(within).contains("cuStreamBeginCapture_v2"), "a recording in another one");
    // Who does not notice the refusal notices at the end.
    let unnoticed = gpu.record(|| {
        assert!(gpu.wait().is_err());
        Ok(())
    });
    assert!(why(unnoticed).contains("cuStreamEndCapture"));
    gpu.scale(x.span(), 3.0).unwrap();
    assert_eq!(read(&gpu, x.span()), [3.0]);
}

#[test]
fn a_graph_is_no_longer_current_once_memory_was_given_back() {
    let gpu = gpu();
    let (x, other) = (on_device(&gpu, &[1.0f32]), on_device(&gpu, &[1.0f32]));
    let graph = gpu.record(|| gpu.scale(x.span(), 2.0)).unwrap();
    assert!(graph.is_current());
    drop(other);
    assert!(!graph.is_current());
    let graph = gpu.record(|| gpu.scale(x.span(), 2.0)).unwrap();
    let host = Pinned::<u8>::new(&gpu, 1).unwrap();
    assert!(graph.is_current());
    drop(host);
    assert!(!graph.is_current());
}
