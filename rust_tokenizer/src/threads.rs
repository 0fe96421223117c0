//! The number of threads to use.

use std::num::NonZero;

/// The requested number of threads, or the number of cores if none was requested.
pub fn threads_or_all(threads: Option<NonZero<usize>>) -> NonZero<usize> {
    threads.unwrap_or_else(|| std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN))
}
