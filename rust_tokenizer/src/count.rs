//! Counting the distinct pieces of a corpus.

use std::collections::HashMap;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};

use rustc_hash::FxBuildHasher;

use crate::error::Error;
use crate::key::{INLINE, inline_key};
use crate::split::Splitter;

/// How often each distinct piece occurs. Memory grows with the distinct pieces, not with the text.
#[derive(Debug, Default)]
pub struct PieceCounts {
    short: HashMap<u128, u64, FxBuildHasher>,
    long: HashMap<Box<[u8]>, u64, FxBuildHasher>,
}

impl PieceCounts {
    /// Splits a text and counts its pieces.
    pub fn add_text(&mut self, splitter: &Splitter, text: &str) -> Result<(), Error> {
        let bytes = text.as_bytes();
        splitter.split(text, |start, end| {
            if end - start <= INLINE {
                *self.short.entry(inline_key(bytes, start, end)).or_insert(0) += 1;
            } else {
                let piece = &bytes[start..end];
                match self.long.get_mut(piece) {
                    Some(count) => *count += 1,
                    None => _ = self.long.insert(piece.into(), 1),
                }
            }
        })
    }

    /// Adds the counts of another table, which another thread filled.
    pub fn merge(&mut self, other: Self) {
        for (key, count) in other.short {
            *self.short.entry(key).or_insert(0) += count;
        }
        for (piece, count) in other.long {
            *self.long.entry(piece).or_insert(0) += count;
        }
    }

    pub fn distinct(&self) -> usize {
        self.short.len() + self.long.len()
    }

    /// Calls `visit(piece, count)` for each distinct piece, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for (key, &count) in &self.short {
            let bytes = key.to_le_bytes();
            visit(&bytes[..usize::from(bytes[INLINE])], count);
        }
        for (piece, &count) in &self.long {
            visit(piece, count);
        }
    }
}

/// Some texts in one allocation.
#[derive(Debug, Default)]
pub struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    pub fn bytes(&self) -> usize {
        self.text.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

/// Counts the pieces of all batches that `next` gives until it gives none. `next` runs on the calling thread while
/// `threads` others count, each into a table of its own; at most two batches a thread wait.
pub fn count_batches<E: From<Error>>(
    splitter: &Splitter,
    threads: NonZero<usize>,
    mut next: impl FnMut() -> Result<Option<Batch>, E>,
) -> Result<PieceCounts, E> {
    let failed = AtomicBool::new(false);
    let (sender, receiver) = mpsc::sync_channel::<Batch>(2 * threads.get());
    let receiver = Mutex::new(receiver);
    let count = || {
        let mut counts = PieceCounts::default();
        // The lock is held while waiting for a batch, and free while counting it.
        while let Some(batch) = receiver.lock().ok().and_then(|receiver| receiver.recv().ok()) {
            for text in batch.texts() {
                if let Err(error) = counts.add_text(splitter, text) {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(counts)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.get()).map(|_| scope.spawn(count)).collect();
        let mut feed = || {
            while !failed.load(Ordering::Relaxed) {
                let Some(batch) = next()? else { break };
                // Nobody receives only if all workers have failed, which they report themselves.
                if sender.send(batch).is_err() {
                    break;
                }
            }
            Ok(())
        };
        let fed = feed();
        drop(sender);
        let mut total = PieceCounts::default();
        for worker in workers {
            let counts = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            if total.distinct() < counts.distinct() {
                let smaller = std::mem::replace(&mut total, counts);
                total.merge(smaller);
            } else {
                total.merge(counts);
            }
        }
        fed.map(|()| total)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::split::DEFAULT_PATTERN;

    proptest! {
        #[test]
        fn counts_equal_a_plain_map(texts in prop::collection::vec("[ab \\néz\\u{0}]{0,60}", 0..6)) {
            let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
            let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
            let (mut left, mut right) = (PieceCounts::default(), PieceCounts::default());
            for (index, text) in texts.iter().enumerate() {
                let side = if index % 2 == 0 { &mut left } else { &mut right };
                side.add_text(&splitter, text).unwrap();
                splitter
                    .split(text, |start, end| *expected.entry(text.as_bytes()[start..end].to_vec()).or_insert(0) += 1)
                    .unwrap();
            }
            left.merge(right);
            let mut found: HashMap<Vec<u8>, u64> = HashMap::new();
            left.for_each(|piece, count| assert_eq!(found.insert(piece.to_vec(), count), None));
            prop_assert_eq!(left.distinct(), found.len());
            prop_assert_eq!(found, expected);
        }
    }
}
