//! A vocabulary of byte strings, and the encoding of one piece with it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

use crate::error::Error;

/// No merge, no neighbour.
const NONE: u32 = u32::MAX;
/// Up to this many bytes, looking at all pairs again for each merge is faster than a heap.
const SHORT: usize = 40;

/// Tokens with ids 0, 1, 2, ... The id is also the rank of the merge that makes the token.
#[derive(Debug)]
pub struct Vocabulary {
    tokens: Vec<Box<[u8]>>,
    ids: HashMap<Box<[u8]>, u32, FxBuildHasher>,
    /// The id of each byte.
    bytes: [u32; 256],
    /// Two ids, the left one in the high half, to the id of their concatenation.
    merges: HashMap<u64, u32, FxBuildHasher>,
}

impl Vocabulary {
    pub fn new(tokens: Vec<Vec<u8>>) -> Result<Self, Error> {
        let tokens: Vec<Box<[u8]>> = tokens.into_iter().map(Vec::into_boxed_slice).collect();
        let mut ids: HashMap<Box<[u8]>, u32, FxBuildHasher> = HashMap::default();
        for (id, token) in tokens.iter().enumerate() {
            if token.is_empty() {
                return Err(Error::Vocabulary(format!("token {id} is empty")));
            }
            if let Some(other) = ids.insert(token.clone(), id as u32) {
                return Err(Error::Vocabulary(format!(
                    "tokens {other} and {id} are the same: {}",
                    token.escape_ascii()
                )));
            }
        }
        let mut bytes = [0; 256];
        for byte in 0..=u8::MAX {
            bytes[usize::from(byte)] = *ids
                .get(&[byte][..])
                .ok_or_else(|| Error::Vocabulary(format!("no token for the single byte 0x{byte:02x}")))?;
        }
        let mut merges = HashMap::default();
        for (id, token) in tokens.iter().enumerate() {
            for middle in 1..token.len() {
                if let (Some(&left), Some(&right)) = (ids.get(&token[..middle]), ids.get(&token[middle..])) {
                    merges.insert(pair(left, right), id as u32);
                }
            }
        }
        Ok(Self { tokens, ids, bytes, merges })
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
        if let Some(&id) = self.ids.get(piece) {
            out.push(id);
        } else if piece.len() <= SHORT {
            self.encode_short(piece, out);
        } else {
            self.encode_long(piece, out);
        }
    }

    fn merge(&self, left: u32, right: u32) -> u32 {
        self.merges.get(&pair(left, right)).copied().unwrap_or(NONE)
    }

    fn encode_short(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut ids = [0u32; SHORT];
        // What the symbol and its right neighbour merge to.
        let mut ranks = [NONE; SHORT];
        let mut length = piece.len();
        for (id, &byte) in ids.iter_mut().zip(piece) {
            *id = self.bytes[usize::from(byte)];
        }
        for at in 1..length {
            ranks[at - 1] = self.merge(ids[at - 1], ids[at]);
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
            ids[at] = best;
            ids.copy_within(at + 2..length, at + 1);
            ranks.copy_within(at + 1..length, at);
            length -= 1;
            ranks[at] = if at + 1 < length { self.merge(ids[at], ids[at + 1]) } else { NONE };
            if at > 0 {
                ranks[at - 1] = self.merge(ids[at - 1], ids[at]);
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
            let rank = self.merge(ids[at - 1], ids[at]);
            if rank != NONE {
                heap.push(Reverse((rank, at - 1)));
            }
        }
        while let Some(Reverse((rank, at))) = heap.pop() {
            let right = next[at];
            // The symbols may have changed since; a symbol that has gone has the id NONE, which merges with nothing.
            if right >= size || self.merge(ids[at], ids[right]) != rank {
                continue;
            }
            ids[at] = rank;
            ids[right] = NONE;
            let after = next[right];
            next[at] = after;
            if after < size {
                previous[after] = at;
                let rank = self.merge(ids[at], ids[after]);
                if rank != NONE {
                    heap.push(Reverse((rank, at)));
                }
            }
            let before = previous[at];
            if before < size {
                let rank = self.merge(ids[before], ids[at]);
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
