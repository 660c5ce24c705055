use super::*;
use crate::cuda::{Mark, Uploads};

#[test]
fn the_device_waits_for_a_mark_where_it_was_when_it_was_told_to() {
    let gpu = gpu();
    let (uploads, mark) = (Uploads::new(&gpu).unwrap(), Mark::new(&gpu).unwrap());
    let mut host = Pinned::<u32>::new(&gpu, 4).unwrap();
    host.as_mut_slice().copy_from_slice(&[1, 2, 3, 4]);
    let (x, y) = (room::<u32>(&gpu, 2), room::<u32>(&gpu, 2));
    // A mark that was never set is waited for by nobody.
    gpu.wait_for(&mark).unwrap();
    mark.wait().unwrap();
    // SAFETY: the host's values stay as they are, and the marks are waited for before the device's are read.
    unsafe { uploads.copy(&host, 0, x.span()).unwrap() };
    uploads.set(&mark).unwrap();
    gpu.wait_for(&mark).unwrap();
    // SAFETY: as above.
    unsafe { uploads.copy(&host, 2, y.span()).unwrap() };
    uploads.set(&mark).unwrap();
    assert_eq!(read(&gpu, x.span()), [1, 2]);
    gpu.wait_for(&mark).unwrap();
    assert_eq!(read(&gpu, y.span()), [3, 4]);
    // SAFETY: waited for by the host.
    unsafe { uploads.copy(&host, 1, y.span()).unwrap() };
    uploads.set(&mark).unwrap();
    mark.wait().unwrap();
    host.as_mut_slice().fill(0);
    assert_eq!(read(&gpu, y.span()), [2, 3]);
}
