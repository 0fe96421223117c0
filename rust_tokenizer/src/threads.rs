//! How many threads to use.

use std::num::NonZero;

/// The number asked for; without one, as many as the machine has cores.
pub fn threads_or_all(threads: Option<NonZero<usize>>) -> NonZero<usize> {
    threads.unwrap_or_else(|| std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN))
}
