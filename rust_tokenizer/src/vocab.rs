//! A vocabulary of byte strings, and the encoding of one piece with it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

use crate::error::Error;
use crate::key::{INLINE, inline_key};

/// No merge, no neighbour.
const NONE: u32 = u32::MAX;
/// Up to this many bytes, looking at all pairs again for each merge is faster than a heap.
const SHORT: usize = 40;

/// Tokens with ids 0, 1, 2, ... and the merges that lead to them.
#[derive(Debug)]
pub struct Vocabulary {
    tokens: Vec<Box<[u8]>>,
    ids: Ids,
    /// Whether a piece that is a token becomes that token, even if no merges lead to it.
    whole_pieces: bool,
    /// The id of each byte.
    bytes: [u32; 256],
    /// Two ids, the left one in the high half, to the rank of their merge. The lowest rank is merged first.
    ranks: HashMap<u64, u32, FxBuildHasher>,
    /// The id that the merge of each rank makes.
    made: Vec<u32>,
}

/// Tokens to their ids; the short ones without a look into the heap.
#[derive(Debug, Default)]
struct Ids {
    short: HashMap<u128, u32, FxBuildHasher>,
    long: HashMap<Box<[u8]>, u32, FxBuildHasher>,
}

impl Ids {
    fn insert(&mut self, token: &[u8], id: u32) -> Option<u32> {
        if token.len() <= INLINE {
            self.short.insert(inline_key(token, 0, token.len()), id)
        } else {
            self.long.insert(token.into(), id)
        }
    }

    fn get(&self, token: &[u8]) -> Option<u32> {
        if token.len() <= INLINE {
            self.short.get(&inline_key(token, 0, token.len())).copied()
        } else {
            self.long.get(token).copied()
        }
    }
}

impl Vocabulary {
    /// tiktoken's rule: any two tokens whose bytes make a third may merge, and the id of the third is the rank.
    pub fn new(tokens: Vec<Vec<u8>>) -> Result<Self, Error> {
        let mut vocabulary = Self::without_merges(tokens, true)?;
        for (id, token) in vocabulary.tokens.iter().enumerate() {
            for middle in 1..token.len() {
                let (left, right) = token.split_at(middle);
                if let (Some(left), Some(right)) = (vocabulary.ids.get(left), vocabulary.ids.get(right)) {
                    vocabulary.ranks.insert(pair(left, right), id as u32);
                }
            }
        }
        vocabulary.made = (0..vocabulary.tokens.len() as u32).collect();
        Ok(vocabulary)
    }

    /// Hugging Face's rule: exactly these pairs of ids merge, the first of them first. `whole_pieces` is what
    /// `tokenizer.json` calls `ignore_merges`.
    pub fn with_merges(tokens: Vec<Vec<u8>>, merges: &[(u32, u32)], whole_pieces: bool) -> Result<Self, Error> {
        let mut vocabulary = Self::without_merges(tokens, whole_pieces)?;
        for (rank, &(left, right)) in merges.iter().enumerate() {
            let bytes = |id: u32| vocabulary.tokens.get(id as usize);
            let (Some(first), Some(second)) = (bytes(left), bytes(right)) else {
                return Err(Error::Vocabulary(format!(
                    "merge {rank} is of tokens {left} and {right}, but there are {}",
                    vocabulary.tokens.len()
                )));
            };
            let Some(id) = vocabulary.ids.get(&[&first[..], &second[..]].concat()) else {
                return Err(Error::Vocabulary(format!("merge {rank}, of tokens {left} and {right}, makes no token")));
            };
            vocabulary.ranks.insert(pair(left, right), rank as u32);
            vocabulary.made.push(id);
        }
        Ok(vocabulary)
    }

    fn without_merges(tokens: Vec<Vec<u8>>, whole_pieces: bool) -> Result<Self, Error> {
        let tokens: Vec<Box<[u8]>> = tokens.into_iter().map(Vec::into_boxed_slice).collect();
        let mut ids = Ids::default();
        for (id, token) in tokens.iter().enumerate() {
            if token.is_empty() {
                return Err(Error::Vocabulary(format!("token {id} is empty")));
            }
            if let Some(other) = ids.insert(token, id as u32) {
                return Err(Error::Vocabulary(format!(
                    "tokens {other} and {id} are the same: {}",
                    token.escape_ascii()
                )));
            }
        }
        let mut bytes = [0; 256];
        for byte in 0..=u8::MAX {
            bytes[usize::from(byte)] = ids
                .get(&[byte])
                .ok_or_else(|| Error::Vocabulary(format!("no token for the single byte 0x{byte:02x}")))?;
        }
        Ok(Self { tokens, ids, whole_pieces, bytes, ranks: HashMap::default(), made: Vec::new() })
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// Appends the ids of a piece: its own if it is a token, else its bytes, merged lowest rank first, ties from the
    /// left. Time n log n in the bytes of the piece.
    pub fn encode_piece(&self, piece: &[u8], out: &mut Vec<u32>) {
        let whole = if self.whole_pieces { self.ids.get(piece) } else { None };
        if let Some(id) = whole {
            out.push(id);
        } else if piece.len() <= SHORT {
            self.encode_short(piece, out);
        } else {
            self.encode_long(piece, out);
        }
    }

    /// The rank of a merge; `NONE` if the two do not merge.
    fn rank(&self, left: u32, right: u32) -> u32 {
        self.ranks.get(&pair(left, right)).copied().unwrap_or(NONE)
    }

    fn encode_short(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut ids = [0u32; SHORT];
        // Of the merge of the symbol with its right neighbour.
        let mut ranks = [NONE; SHORT];
        let mut length = piece.len();
        for (id, &byte) in ids.iter_mut().zip(piece) {
            *id = self.bytes[usize::from(byte)];
        }
        for at in 1..length {
            ranks[at - 1] = self.rank(ids[at - 1], ids[at]);
        }
        loop {
            let (mut at, mut best) = (0, NONE);
            for (index, &rank) in ranks[..length].iter().enumerate() {
                if rank < best {
                    (at, best) = (index, rank);
                }
            }
            if best == NONE {
                break;
            }
            ids[at] = self.made[best as usize];
            ids.copy_within(at + 2..length, at + 1);
            ranks.copy_within(at + 1..length, at);
            length -= 1;
            ranks[at] = if at + 1 < length { self.rank(ids[at], ids[at + 1]) } else { NONE };
            if at > 0 {
                ranks[at - 1] = self.rank(ids[at - 1], ids[at]);
            }
        }
        out.extend_from_slice(&ids[..length]);
    }

    /// A heap of possible merges over a linked list of symbols. A symbol is named by the place of its first byte.
    fn encode_long(&self, piece: &[u8], out: &mut Vec<u32>) {
        let size = piece.len();
        let mut ids: Vec<u32> = piece.iter().map(|&byte| self.bytes[usize::from(byte)]).collect();
        let mut next: Vec<usize> = (1..=size).collect();
        let mut previous: Vec<usize> = (0..size).map(|at| at.wrapping_sub(1)).collect();
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> = BinaryHeap::with_capacity(size);
        for at in 1..size {
            let rank = self.rank(ids[at - 1], ids[at]);
            if rank != NONE {
                heap.push(Reverse((rank, at - 1)));
            }
        }
        while let Some(Reverse((rank, at))) = heap.pop() {
            let right = next[at];
            // The symbols may have changed since; a symbol that has gone has the id NONE, which merges with nothing.
            if right >= size || self.rank(ids[at], ids[right]) != rank {
                continue;
            }
            ids[at] = self.made[rank as usize];
            ids[right] = NONE;
            let after = next[right];
            next[at] = after;
            if after < size {
                previous[after] = at;
                let rank = self.rank(ids[at], ids[after]);
                if rank != NONE {
                    heap.push(Reverse((rank, at)));
                }
            }
            let before = previous[at];
            if before < size {
                let rank = self.rank(ids[before], ids[at]);
                if rank != NONE {
                    heap.push(Reverse((rank, before)));
                }
            }
        }
        out.extend(ids.into_iter().filter(|&id| id != NONE));
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The 256 bytes in reverse order, then some tokens.
    fn vocabulary(extra: &[&str]) -> Vocabulary {
        let bytes = (0..=u8::MAX).rev().map(|byte| vec![byte]);
        Vocabulary::new(bytes.chain(extra.iter().map(|token| token.as_bytes().to_vec())).collect()).unwrap()
    }

    /// tiktoken's definition: while two neighbours make a token, merge those that make the lowest, the leftmost first.
    fn reference(vocabulary: &Vocabulary, piece: &[u8]) -> Vec<u32> {
        if let Some(id) = vocabulary.ids.get(piece) {
            return vec![id];
        }
        let mut parts: Vec<&[u8]> = piece.chunks(1).collect();
        let mut offsets: Vec<usize> = (0..=piece.len()).collect();
        loop {
            let candidates = (0..offsets.len().saturating_sub(2))
                .filter_map(|at| vocabulary.ids.get(&piece[offsets[at]..offsets[at + 2]]).map(|id| (id, at)));
            let Some((_, at)) = candidates.min() else { break };
            offsets.remove(at + 1);
            parts = offsets.windows(2).map(|pair| &piece[pair[0]..pair[1]]).collect();
        }
        parts.iter().map(|part| vocabulary.ids.get(part).unwrap()).collect()
    }

    #[test]
    fn refuses_what_is_no_vocabulary() {
        let message = |tokens| Vocabulary::new(tokens).unwrap_err().to_string();
        let bytes: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
        assert_eq!(message(bytes[..255].to_vec()), "no token for the single byte 0xff");
        assert_eq!(message([bytes.clone(), vec![b"a".to_vec()]].concat()), "tokens 97 and 256 are the same: a");
        assert_eq!(message([bytes, vec![Vec::new()]].concat()), "token 256 is empty");
    }

    proptest! {
        #[test]
        fn short_and_long_equal_the_reference(piece in "[abcd]{1,120}", shuffle in any::<prop::sample::Index>()) {
            let mut extra = vec!["ab", "aa", "bc", "cd", "abc", "aab", "bcd", "aaaa", "abab", "da", "dab", "abcdabcd"];
            extra.rotate_left(shuffle.index(12));
            let vocabulary = vocabulary(&extra);
            let (mut any, mut long) = (Vec::new(), Vec::new());
            vocabulary.encode_piece(piece.as_bytes(), &mut any);
            let expected = reference(&vocabulary, piece.as_bytes());
            prop_assert_eq!(&any, &expected);
            if expected.len() > 1 {
                vocabulary.encode_long(piece.as_bytes(), &mut long);
                prop_assert_eq!(&long, &expected);
            }
        }
    }
}
