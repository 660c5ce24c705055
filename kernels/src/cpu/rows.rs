//! How element-wise kernels are shared out: whole rows, as many to a task as outweigh handing it out.

use std::ops::Range;

use super::Cpu;

/// Values of one task: at 16 KiB in and out a task lasts microseconds, and stays in the first-level cache.
const TASK_VALUES: usize = 4 * 1024;

/// Calls `body` on disjoint ranges that cover `0..rows`, in parallel where there is enough to share. A single row of
/// a model's width is one task, and one task wakes no thread.
pub fn each_range(cpu: &Cpu, rows: usize, row_values: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
    let rows_a_task = (TASK_VALUES / row_values.max(1)).max(1);
    // A few rows are done sooner here than handed out.
    let rows_a_task = if rows <= 2 * rows_a_task { rows.max(1) } else { rows_a_task };
    cpu.pool.run(rows.div_ceil(rows_a_task), &|task| {
        let start = task * rows_a_task;
        body(start..rows.min(start + rows_a_task));
    });
}
