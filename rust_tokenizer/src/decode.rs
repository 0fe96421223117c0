//! Ids back to bytes.

use crate::error::Error;

/// The bytes of all tokens in one allocation, so that the frequent ones share the processor's cache.
#[derive(Debug)]
pub struct Decoder {
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
        decoder
    }

    /// The bytes of the tokens, one after the other.
    pub fn decode(&self, ids: &[i64]) -> Result<Vec<u8>, Error> {
        // English has about four bytes a token.
        let mut out = Vec::with_capacity(ids.len() * 5);
        for &id in ids {
            let token = usize::try_from(id).ok().and_then(|id| self.ends.get(id..id.checked_add(2)?));
            let Some(&[start, end]) = token else { return Err(Error::Id { id, size: self.ends.len() - 1 }) };
            out.extend_from_slice(&self.bytes[start..end]);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_and_out_of_range() {
        let decoder = Decoder::new([&b"a"[..], b"bcd", b"\xff"].into_iter());
        assert_eq!(decoder.decode(&[1, 0, 2, 1]).unwrap(), b"bcda\xffbcd");
        assert_eq!(decoder.decode(&[]).unwrap(), b"");
        for id in [3, -1, i64::MAX, i64::MIN] {
            assert_eq!(decoder.decode(&[0, id]), Err(Error::Id { id, size: 3 }));
        }
    }
}
