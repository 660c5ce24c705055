//! A slice that the tasks of a parallel region write, each elements of its own.

use std::marker::PhantomData;
use std::ops::Range;

pub struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: tasks write disjoint elements (promised to `new`), and nobody reads before the region ends.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T: Copy> Disjoint<'a, T> {
    /// Whoever makes one sees to it that no element is written by two tasks.
    pub fn new(slice: &'a mut [T]) -> Disjoint<'a, T> {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Writes the elements from `at` on, which no other task writes.
    #[inline(always)]
    pub fn put(&self, at: usize, values: &[T]) {
        assert!(at + values.len() <= self.len);
        // SAFETY: in bounds, and no other task writes these elements.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(at), values.len()) }
    }

    /// The elements of `range`, which no other task touches.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds, and no other task touches these elements.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
