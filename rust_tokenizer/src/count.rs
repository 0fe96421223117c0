//! Counting the distinct pieces of a corpus.

use std::collections::HashMap;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use rustc_hash::FxBuildHasher;

use crate::error::Error;
use crate::piece_key::{INLINE, inline_key, slot};
use crate::split::Splitter;

/// 2^14 entries of 32 bytes fill half of a typical L2 cache.
const FRONT_BITS: u32 = 14;
const BLOCK: usize = 64;
/// The size of a full batch in bytes.
pub const FULL: usize = 1 << 20;

/// How often each distinct piece occurs. Memory grows with the number of distinct pieces, not with the text.
#[derive(Debug, Default)]
pub struct PieceCounts {
    short: ShortCounts,
    long: HashMap<Box<[u8]>, u64, FxBuildHasher>,
}

impl PieceCounts {
    fn add_long(&mut self, piece: &[u8], count: u64) {
        match self.long.get_mut(piece) {
            Some(sum) => *sum += count,
            None => _ = self.long.insert(piece.into(), count),
        }
    }

    /// Adds the counts of another table, such as one filled by another thread.
    pub fn merge(&mut self, other: Self) {
        other.short.iter().for_each(|(key, count)| self.short.add(key, count));
        other.long.into_iter().for_each(|(piece, count)| self.add_long(&piece, count));
    }

    pub fn distinct(&self) -> usize {
        self.short.filled + self.long.len()
    }

    /// Calls `visit(piece, count)` for each distinct piece, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for (key, count) in self.short.iter() {
            let bytes = key.to_le_bytes();
            visit(&bytes[..usize::from(bytes[INLINE])], count);
        }
        for (piece, &count) in &self.long {
            visit(piece, count);
        }
    }
}

/// Counts by key. Open addressing, at most half full, so that nearly every look-up is a single memory access.
#[derive(Debug)]
struct ShortCounts {
    /// Keys and counts; an empty slot has the key 0, which no piece has.
    entries: Vec<(u128, u64)>,
    bits: u32,
    filled: usize,
}

impl Default for ShortCounts {
    fn default() -> Self {
        Self::with_bits(10)
    }
}

impl ShortCounts {
    fn with_bits(bits: u32) -> Self {
        Self { entries: vec![(0, 0); 1 << bits], bits, filled: 0 }
    }

    #[inline(always)]
    fn add(&mut self, key: u128, count: u64) {
        let mut at = slot(key, self.bits);
        loop {
            let entry = &mut self.entries[at];
            if entry.0 == key {
                entry.1 += count;
                return;
            }
            if entry.0 == 0 {
                break;
            }
            at = (at + 1) & (self.entries.len() - 1);
        }
        self.insert(at, key, count);
    }

    #[cold]
    fn insert(&mut self, at: usize, key: u128, count: u64) {
        self.entries[at] = (key, count);
        self.filled += 1;
        if 2 * self.filled > self.entries.len() {
            let old = std::mem::replace(self, Self::with_bits(self.bits + 1));
            old.iter().for_each(|(key, count)| self.add(key, count));
        }
    }

    fn iter(&self) -> impl Iterator<Item = (u128, u64)> {
        self.entries.iter().copied().filter(|&(key, _)| key != 0)
    }
}

/// Counts the pieces of texts. A small table sits in front of the full one: a new piece replaces an old one there,
/// whose count then moves to the full table. Most pieces of a text are among a few thousand.
#[derive(Debug)]
pub struct Counter {
    front: Vec<(u128, u64)>,
    counts: PieceCounts,
}

impl Default for Counter {
    fn default() -> Self {
        Self { front: vec![(0, 0); 1 << FRONT_BITS], counts: PieceCounts::default() }
    }
}

impl Counter {
    /// Splits a text and counts its pieces.
    pub fn add_text(&mut self, splitter: &Splitter, text: &str) -> Result<(), Error> {
        let bytes = text.as_bytes();
        // Keys are counted in blocks so that the look-ups of a block overlap and do not wait for the scanner.
        let mut keys = [0; BLOCK];
        let mut number = 0;
        splitter.split(text, |start, end| {
            if end - start <= INLINE {
                keys[number] = inline_key(bytes, start, end);
                number += 1;
                if number == BLOCK {
                    self.add_keys(&keys);
                    number = 0;
                }
            } else {
                self.counts.add_long(&bytes[start..end], 1);
            }
        })?;
        self.add_keys(&keys[..number]);
        Ok(())
    }

    fn add_keys(&mut self, keys: &[u128]) {
        for &key in keys {
            let recent = &mut self.front[slot(key, FRONT_BITS)];
            if recent.0 == key {
                recent.1 += 1;
            } else {
                let (old, count) = std::mem::replace(recent, (key, 1));
                if count > 0 {
                    self.counts.short.add(old, count);
                }
            }
        }
    }

    /// The counts of all texts.
    pub fn finish(mut self) -> PieceCounts {
        for (key, count) in self.front.into_iter().filter(|&(_, count)| count > 0) {
            self.counts.short.add(key, count);
        }
        self.counts
    }
}

/// Several texts in one allocation.
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

    /// Replaces the texts with those that Arrow stores in `bytes`: text i is `bytes[offsets[i]..offsets[i + 1]]`.
    /// On damaged input, returns what is wrong and leaves the batch empty.
    pub fn replace(&mut self, offsets: &[i64], bytes: &[u8]) -> Result<(), &'static str> {
        self.clear();
        let [first, ends @ ..] = offsets else { return Ok(()) };
        let range = usize::try_from(*first).unwrap_or(usize::MAX)..offsets.last().map_or(0, |&end| end as usize);
        let bytes = bytes.get(range).ok_or("the offsets lie outside the bytes")?;
        self.text.push_str(std::str::from_utf8(bytes).map_err(|_| "a text is not UTF-8")?);
        let mut start = *first;
        for &end in ends {
            let at = (end - first) as usize;
            if end < start || !self.text.is_char_boundary(at) {
                self.clear();
                return Err("the offsets do not ascend, or lie inside a character");
            }
            self.ends.push(at);
            start = end;
        }
        Ok(())
    }

    /// Drops the texts after the one in which the character count reaches `limit`. Returns the number of characters
    /// kept.
    pub fn truncate(&mut self, limit: u64) -> u64 {
        let (mut characters, mut kept) = (0, 0);
        for text in self.texts() {
            if characters >= limit {
                break;
            }
            characters += text.chars().count() as u64;
            kept += 1;
        }
        self.ends.truncate(kept);
        characters
    }

    /// Removes the texts and keeps the allocation.
    fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }

    /// Whether the batch is large enough to be worth handing to a thread; it still fits into the cache for counting.
    pub fn is_full(&self) -> bool {
        self.text.len() >= FULL
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

/// Counts the pieces of all batches that `next` fills, until it leaves one empty. `next` runs on the calling thread
/// while `threads` others count, each into its own table. At most two batches per thread are waiting at a time.
pub fn count_batches<E: From<Error>>(
    splitter: &Splitter,
    threads: NonZero<usize>,
    mut next: impl FnMut(&mut Batch) -> Result<(), E>,
) -> Result<PieceCounts, E> {
    let failed = AtomicBool::new(false);
    let (sender, receiver) = mpsc::sync_channel::<Batch>(2 * threads.get());
    // The workers own the receiver, so that a sender waiting for room gets an error once all of them have ended.
    let receiver = Arc::new(Mutex::new(receiver));
    // Batches are reused: fresh memory costs more than copying a text into it.
    let (used_sender, used) = mpsc::channel::<Batch>();
    let count = |receiver: Arc<Mutex<mpsc::Receiver<Batch>>>, used: mpsc::Sender<Batch>| {
        let mut counter = Counter::default();
        // The lock is held while waiting for a batch and released while counting it.
        while let Some(mut batch) = receiver.lock().ok().and_then(|receiver| receiver.recv().ok()) {
            for text in batch.texts() {
                if let Err(error) = counter.add_text(splitter, text) {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            batch.clear();
            // Sending fails only when no more batches are coming.
            _ = used.send(batch);
        }
        Ok(counter.finish())
    };
    std::thread::scope(|scope| {
        let worker = |_| {
            let (receiver, used) = (Arc::clone(&receiver), used_sender.clone());
            scope.spawn(|| count(receiver, used))
        };
        let workers: Vec<_> = (0..threads.get()).map(worker).collect();
        drop(receiver);
        let mut feed = || {
            while !failed.load(Ordering::Relaxed) {
                let mut batch = used.try_recv().unwrap_or_default();
                next(&mut batch)?;
                // Sending fails only if all workers have failed, and they report that themselves.
                if batch.is_empty() || sender.send(batch).is_err() {
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
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::split::DEFAULT_PATTERN;

    proptest! {
        #[test]
        fn counts_equal_a_plain_map(texts in prop::collection::vec("[ab \\néz\\u{0}]{0,60}", 0..6)) {
            let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
            let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
            let (mut left, mut right) = (Counter::default(), Counter::default());
            for (index, text) in texts.iter().enumerate() {
                let side = if index % 2 == 0 { &mut left } else { &mut right };
                side.add_text(&splitter, text).unwrap();
                splitter
                    .split(text, |start, end| *expected.entry(text.as_bytes()[start..end].to_vec()).or_insert(0) += 1)
                    .unwrap();
            }
            let mut left = left.finish();
            left.merge(right.finish());
            let mut found: HashMap<Vec<u8>, u64> = HashMap::new();
            left.for_each(|piece, count| assert_eq!(found.insert(piece.to_vec(), count), None));
            prop_assert_eq!(left.distinct(), found.len());
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn counting_ends_when_all_threads_have_failed() {
        let splitter = Splitter::new(r"(x?)(?:a|aa)+\1(?<!a)|[^a]").unwrap();
        let text = "a".repeat(60) + "!";
        let (sender, receiver) = mpsc::channel();
        // Counting runs on a thread of its own, so that the test fails, and does not hang, if it never ends.
        std::thread::spawn(move || {
            let next = |batch: &mut Batch| -> Result<(), Error> {
                batch.push(&text);
                Ok(())
            };
            _ = sender.send(count_batches(&splitter, NonZero::<usize>::MIN, next));
        });
        let counted = receiver.recv_timeout(Duration::from_secs(60)).expect("counting hangs");
        assert!(matches!(counted, Err(Error::Split(_))));
    }
}
