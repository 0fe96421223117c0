//! Encoding texts, in parallel and with caches.

use std::num::NonZero;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Error;
use crate::piece_key::{INLINE, inline_key, slot};
use crate::split::Splitter;
use crate::threads::threads_or_all;
use crate::vocab::Vocabulary;

/// Encoding fewer bytes than this is faster than starting a thread.
const BYTES_A_THREAD: usize = 1 << 15;
/// Texts are handed to threads in blocks of about this many bytes.
const BLOCK: usize = 1 << 18;
/// 2^17 entries of 32 bytes take 4 MB per thread and encode English at 103 MB/s (2^14: 82 MB/s, 2^18: 110 MB/s).
const CACHE_BITS: u32 = 17;
/// A key, three ids and their count fill an entry's 32 bytes.
const CACHED_IDS: usize = 3;

/// The concatenated ids of several texts; text i has `ids[offsets[i]..offsets[i + 1]]`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub offsets: Vec<i64>,
}

/// Recently seen pieces and their ids: a direct-mapped table, in which a new piece replaces the old one in its slot.
/// Most of a text consists of few distinct pieces. One cache serves one thread at a time.
struct Cache(Vec<Entry>);

#[derive(Clone, Copy)]
struct Entry {
    /// The `inline_key` of the piece; 0, the key of the empty piece, in an empty slot.
    key: u128,
    count: u32,
    ids: [u32; CACHED_IDS],
}

impl Cache {
    fn new() -> Self {
        Self(vec![Entry { key: 0, count: 0, ids: [0; CACHED_IDS] }; 1 << CACHE_BITS])
    }
}

/// Splits texts and encodes their pieces.
pub struct Encoder {
    splitter: Splitter,
    vocabulary: Vocabulary,
    /// Caches that are not in use by a thread.
    caches: Mutex<Vec<Cache>>,
}

impl Encoder {
    pub fn new(splitter: Splitter, vocabulary: Vocabulary) -> Self {
        Self { splitter, vocabulary, caches: Mutex::new(Vec::new()) }
    }

    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// The ids of each text, in order, with `prepend` before and `append` after each text if given. `threads` defaults
    /// to the number of cores; fewer are used when there is little text.
    pub fn encode<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        prepend: Option<u32>,
        append: Option<u32>,
        threads: Option<NonZero<usize>>,
    ) -> Result<Encoded, Error> {
        let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
        let threads = threads_or_all(threads).get().min(bytes / BYTES_A_THREAD);
        let encode_block = |block: &[T], cache: &mut Cache| {
            let mut encoded = Encoded::default();
            for text in block {
                encoded.ids.extend(prepend);
                self.encode_text(text.as_ref(), cache, &mut encoded.ids)?;
                encoded.ids.extend(append);
                encoded.offsets.push(encoded.ids.len() as i64);
            }
            Ok(encoded)
        };
        let parts = if threads <= 1 {
            vec![self.with_cache(|cache| encode_block(texts, cache))?]
        } else {
            self.in_parallel(&blocks(texts, BLOCK.min(bytes / threads)), threads, encode_block)?
        };
        Ok(concatenate(parts, texts.len()))
    }

    /// Runs `work` on each block, on threads that take the next block when they are free. Results are in block order.
    fn in_parallel<T: Sync>(
        &self,
        blocks: &[&[T]],
        threads: usize,
        work: impl Fn(&[T], &mut Cache) -> Result<Encoded, Error> + Sync,
    ) -> Result<Vec<Encoded>, Error> {
        let next = AtomicUsize::new(0);
        let results: Vec<Mutex<Option<Result<Encoded, Error>>>> = blocks.iter().map(|_| Mutex::new(None)).collect();
        let run = || {
            self.with_cache(|cache| {
                while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&index| index < blocks.len())
                {
                    let result = work(blocks[index], cache);
                    *results[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(result);
                }
            });
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.min(blocks.len()) {
                // If the system cannot start a thread, the others do the work.
                let _ = std::thread::Builder::new().spawn_scoped(scope, run);
            }
            run();
        });
        results
            .into_iter()
            .map(|slot| {
                slot.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).unwrap_or(Ok(Encoded::default()))
            })
            .collect()
    }

    /// Lends a cache to `work`. Caches outlive calls, so that repeated small calls find them warm.
    fn with_cache<R>(&self, work: impl FnOnce(&mut Cache) -> R) -> R {
        let free = || self.caches.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let cache = free().pop();
        let mut cache = cache.unwrap_or_else(Cache::new);
        let result = work(&mut cache);
        free().push(cache);
        result
    }

    fn encode_text(&self, text: &str, cache: &mut Cache, out: &mut Vec<u32>) -> Result<(), Error> {
        let bytes = text.as_bytes();
        self.splitter.split(text, |start, end| {
            if end - start > INLINE {
                self.vocabulary.encode_piece(&bytes[start..end], out);
                return;
            }
            let key = inline_key(bytes, start, end);
            let entry = &mut cache.0[slot(key, CACHE_BITS)];
            if entry.key == key {
                match entry.count {
                    1 => out.push(entry.ids[0]),
                    count => out.extend_from_slice(&entry.ids[..count as usize]),
                }
                return;
            }
            let before = out.len();
            self.vocabulary.encode_piece(&bytes[start..end], out);
            let ids = &out[before..];
            if ids.len() <= CACHED_IDS {
                entry.key = key;
                entry.count = ids.len() as u32;
                entry.ids[..ids.len()].copy_from_slice(ids);
            }
        })
    }
}

/// Consecutive runs of texts of about `size` bytes each.
fn blocks<T: AsRef<str>>(texts: &[T], size: usize) -> Vec<&[T]> {
    let mut blocks = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes >= size {
            blocks.push(&texts[start..=index]);
            (start, bytes) = (index + 1, 0);
        }
    }
    if start < texts.len() {
        blocks.push(&texts[start..]);
    }
    blocks
}

fn concatenate(parts: Vec<Encoded>, texts: usize) -> Encoded {
    let mut offsets = Vec::with_capacity(texts + 1);
    offsets.push(0);
    let mut parts = parts.into_iter();
    let Some(Encoded { mut ids, offsets: first }) = parts.next() else { return Encoded { ids: Vec::new(), offsets } };
    offsets.extend(first);
    let rest: Vec<Encoded> = parts.collect();
    ids.reserve_exact(rest.iter().map(|part| part.ids.len()).sum());
    for part in rest {
        let base = ids.len() as i64;
        offsets.extend(part.offsets.iter().map(|offset| base + offset));
        ids.extend(part.ids);
    }
    Encoded { ids, offsets }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::count::Counter;
    use crate::split::DEFAULT_PATTERN;
    use crate::train::learn;

    const SAMPLE: &str =
        "the cat sat on the mat; the other cat's hat was 1234 years old.\n\nEverything else, éclair.  ";

    fn encoder(pattern: &str) -> Encoder {
        let splitter = Splitter::new(pattern).unwrap();
        let mut counts = Counter::default();
        counts.add_text(&splitter, SAMPLE).unwrap();
        let tokens = learn(&counts.finish(), 290, usize::MAX, |_| false).unwrap();
        Encoder::new(splitter, Vocabulary::new(tokens).unwrap())
    }

    #[test]
    fn threads_give_the_same_as_one() {
        let encoder = encoder(DEFAULT_PATTERN);
        let texts: Vec<String> = (0..400).map(|i| SAMPLE.repeat(i % 13) + &i.to_string()).collect();
        let one = encoder.encode(&texts, Some(7), Some(9), NonZero::new(1)).unwrap();
        assert_eq!(encoder.encode(&texts, Some(7), Some(9), NonZero::new(3)).unwrap(), one);
        assert_eq!(one.offsets.len(), 401);
        for (range, text) in one.offsets.windows(2).zip(&texts) {
            let ids = &one.ids[range[0] as usize..range[1] as usize];
            assert_eq!((ids[0], ids[ids.len() - 1]), (7, 9));
            assert_eq!(decode(&encoder, &ids[1..ids.len() - 1]), text.as_bytes());
        }
    }

    #[test]
    fn no_text_and_empty_texts() {
        let encoder = encoder(DEFAULT_PATTERN);
        assert_eq!(encoder.encode::<&str>(&[], Some(1), None, None).unwrap().offsets, [0]);
        assert_eq!(encoder.encode(&["", ""], None, None, None).unwrap(), Encoded { ids: vec![], offsets: vec![0; 3] });
    }

    fn decode(encoder: &Encoder, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|&id| encoder.vocabulary().tokens()[id as usize].iter().copied()).collect()
    }

    /// The default pattern, and the same pattern in a group, which forces the regex engine.
    static BOTH: LazyLock<(Encoder, Encoder)> =
        LazyLock::new(|| (encoder(DEFAULT_PATTERN), encoder(&format!("(?:{DEFAULT_PATTERN})"))));

    proptest! {
        #[test]
        fn round_trip_and_custom_pattern(text in "(\\PC|[ \\n'a-e0-9]){0,200}") {
            let (scanner, regex) = &*BOTH;
            // The second call reads from the cache.
            for _ in 0..2 {
                let encoded = scanner.encode(&[&text], None, None, None).unwrap();
                prop_assert_eq!(decode(scanner, &encoded.ids), text.as_bytes());
                prop_assert_eq!(regex.encode(&[&text], None, None, None).unwrap(), encoded);
            }
        }
    }
}
