//! Decoding: token ids back to bytes.

use std::num::NonZero;

use crate::error::Error;
use crate::threads::threads_or_all;

/// Most tokens are shorter than this. Copying a fixed number of bytes takes fewer instructions than copying exactly
/// as many as needed.
const WINDOW: usize = 16;
/// A thread is not worth starting for fewer ids than this.
const IDS_A_THREAD: usize = 1 << 16;

/// An integer type that can hold ids.
pub trait Id: Copy + Sync {
    /// The id as a number wide enough for any value, including invalid ids.
    fn number(self) -> i64;
}

impl Id for i64 {
    fn number(self) -> i64 {
        self
    }
}

impl Id for u32 {
    fn number(self) -> i64 {
        self.into()
    }
}

/// The bytes of all tokens in one allocation, so that the frequent ones stay in the processor's cache.
#[derive(Debug)]
pub struct Decoder {
    /// The tokens, followed by `WINDOW` bytes of padding.
    bytes: Vec<u8>,
    /// Token i is `bytes[ends[i]..ends[i + 1]]`.
    ends: Vec<usize>,
}

impl Decoder {
    pub fn new<'a>(tokens: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut decoder = Self { bytes: Vec::new(), ends: vec![0] };
        for token in tokens {
            decoder.bytes.extend_from_slice(token);
            decoder.ends.push(decoder.bytes.len());
        }
        decoder.bytes.extend_from_slice(&[0; WINDOW]);
        decoder
    }

    #[inline(always)]
    fn range<I: Id>(&self, id: I) -> Option<(usize, usize)> {
        match self.ends.get(usize::try_from(id.number()).ok()?..)? {
            [start, end, ..] => Some((*start, *end)),
            _ => None,
        }
    }

    /// The total number of bytes of the tokens.
    pub fn size<I: Id>(&self, ids: &[I]) -> Result<usize, Error> {
        ids.iter().try_fold(0, |sum, &id| match self.range(id) {
            Some((start, end)) => Ok(sum + end - start),
            None => Err(Error::Id { id: id.number(), size: self.ends.len() - 1 }),
        })
    }

    /// The concatenated bytes of the tokens.
    pub fn decode<I: Id>(&self, ids: &[I], threads: Option<NonZero<usize>>) -> Result<Vec<u8>, Error> {
        let decoding = self.prepare(ids, threads)?;
        let mut out = vec![0; decoding.size()];
        decoding.write(&mut out);
        Ok(out)
    }

    /// Checks all ids and adds up their sizes, so that the caller can allocate exactly as many bytes. `threads`
    /// defaults to the number of cores; fewer are used when there are few ids.
    pub fn prepare<'a, I: Id>(
        &'a self,
        ids: &'a [I],
        threads: Option<NonZero<usize>>,
    ) -> Result<Decoding<'a, I>, Error> {
        let most = ids.len() / IDS_A_THREAD;
        let threads = if most < 2 { 1 } else { threads_or_all(threads).get().min(most) };
        let parts: Vec<&[I]> = ids.chunks(ids.len().div_ceil(threads).max(1)).collect();
        let sizes: Result<Vec<usize>, Error> = in_parallel(parts.iter().map(|part| || self.size(part))).collect();
        Ok(Decoding { decoder: self, parts, sizes: sizes? })
    }

    /// Writes the bytes of valid ids to `out`, which must be exactly as long.
    fn write<I: Id>(&self, ids: &[I], out: &mut [u8]) {
        let mut at = 0;
        for (start, end) in ids.iter().filter_map(|&id| self.range(id)) {
            let size = end - start;
            // Excess bytes are overwritten by the next token.
            match (out.get_mut(at..at + WINDOW), self.bytes.get(start..start + WINDOW)) {
                (Some(slot), Some(window)) if size <= WINDOW => slot.copy_from_slice(window),
                _ => out[at..at + size].copy_from_slice(&self.bytes[start..end]),
            }
            at += size;
        }
    }
}

/// Ids known to be valid, split into one part per thread, with the size of each part in bytes.
pub struct Decoding<'a, I> {
    decoder: &'a Decoder,
    parts: Vec<&'a [I]>,
    sizes: Vec<usize>,
}

impl<I: Id> Decoding<'_, I> {
    /// The bytes of all tokens.
    pub fn size(&self) -> usize {
        self.sizes.iter().sum()
    }

    /// Writes the bytes to `out`, which must be exactly `size()` long.
    pub fn write(&self, mut out: &mut [u8]) {
        let jobs = self.parts.iter().zip(&self.sizes).map(|(part, &size)| {
            let (slot, behind) = std::mem::take(&mut out).split_at_mut(size);
            out = behind;
            || self.decoder.write(part, slot)
        });
        in_parallel(jobs).for_each(drop);
    }
}

/// The results of all jobs. The first runs on the calling thread, each of the others on its own.
fn in_parallel<R: Send>(mut jobs: impl Iterator<Item = impl FnOnce() -> R + Send>) -> impl Iterator<Item = R> {
    std::thread::scope(|scope| {
        let first = jobs.next();
        let others: Vec<_> = jobs.map(|job| scope.spawn(job)).collect();
        let first = first.map(|job| job());
        let others =
            others.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        first.into_iter().chain(others).collect::<Vec<R>>().into_iter()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LONG: &[u8] = b"a token of more bytes than one window has";

    fn decoder() -> Decoder {
        Decoder::new([&b"a"[..], b"bcd", b"\xff", b"sixteen bytes !!", LONG].into_iter())
    }

    #[test]
    fn ids_in_and_out_of_range() {
        assert_eq!(decoder().decode(&[1i64, 0, 2, 1], None).unwrap(), b"bcda\xffbcd");
        assert_eq!(decoder().decode(&[0i64; 0], None).unwrap(), b"");
        for id in [5, -1, i64::MAX, i64::MIN] {
            assert_eq!(decoder().decode(&[0, id], None), Err(Error::Id { id, size: 5 }));
        }
        assert_eq!(decoder().decode(&[u32::MAX], None), Err(Error::Id { id: u32::MAX.into(), size: 5 }));
    }

    #[test]
    fn threads_give_the_same_as_one() {
        let ids: Vec<u32> = (0..5 * IDS_A_THREAD as u32 + 7).map(|i| i.wrapping_mul(2_654_435_761) % 5).collect();
        let one = decoder().decode(&ids, NonZero::new(1)).unwrap();
        assert_eq!(decoder().decode(&ids, NonZero::new(3)).unwrap(), one);
        let bad = [&ids[..], &[9]].concat();
        assert_eq!(decoder().decode(&bad, NonZero::new(3)), Err(Error::Id { id: 9, size: 5 }));
    }

    proptest! {
        #[test]
        fn equals_plain_concatenation(ids in prop::collection::vec(0u32..5, 0..50)) {
            let tokens = [&b"a"[..], b"bcd", b"\xff", b"sixteen bytes !!", LONG];
            let expected: Vec<u8> = ids.iter().flat_map(|&id| tokens[id as usize].iter().copied()).collect();
            prop_assert_eq!(decoder().size(&ids).unwrap(), expected.len());
            prop_assert_eq!(decoder().decode(&ids, None).unwrap(), expected);
        }
    }
}
