//! A vocabulary of byte strings, and encoding a piece with it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

use crate::error::Error;
use crate::piece_key::{INLINE, inline_key};

/// Stands for no merge and for no neighbour.
const NONE: u32 = u32::MAX;
/// Up to this many bytes, scanning all pairs for each merge is faster than a heap. Windows of longer pieces start with
/// this size too: 40 is best for words without spaces between them, 32 for random letters.
const SHORT: usize = 40;
/// The last fifth of a window is encoded again in the next one: its end rarely affects more than a few tokens.
const MARGIN: usize = 5;

/// Tokens with ids 0, 1, 2, ... and the merges that form them.
#[derive(Debug)]
pub struct Vocabulary {
    tokens: Vec<Box<[u8]>>,
    /// The lengths of the tokens, which encoding a long piece needs more often than their bytes.
    sizes: Vec<u32>,
    ids: Ids,
    /// Whether a piece that is a token becomes that token even if no merges form it.
    whole_pieces: bool,
    /// The id of each byte.
    bytes: [u32; 256],
    /// The ranks of the merges of two bytes, the left one in the high half of the index. Every piece starts from these.
    byte_ranks: Vec<u32>,
    /// The rank of the merge of two ids, keyed with the left id in the high half. The lowest rank is merged first.
    ranks: HashMap<u64, u32, FxBuildHasher>,
    /// The id that the merge of each rank forms.
    made: Vec<u32>,
}

/// Maps tokens to their ids; short tokens are stored inline, without a heap allocation.
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
    /// tiktoken's rule: any two tokens whose concatenation is a token may merge, and the id of that token is the rank.
    pub fn new(tokens: Vec<Vec<u8>>) -> Result<Self, Error> {
        let mut vocabulary = Self::without_merges(tokens, true)?;
        // Whether a token has a length; without it, a token of a megabyte would take minutes.
        let mut lengths = vec![false; 1 + vocabulary.sizes.iter().max().map_or(0, |&size| size as usize)];
        vocabulary.sizes.iter().for_each(|&size| lengths[size as usize] = true);
        for (id, token) in vocabulary.tokens.iter().enumerate() {
            for middle in (1..token.len()).filter(|&middle| lengths[middle] && lengths[token.len() - middle]) {
                let (left, right) = token.split_at(middle);
                if let (Some(left), Some(right)) = (vocabulary.ids.get(left), vocabulary.ids.get(right)) {
                    vocabulary.ranks.insert(pair(left, right), id as u32);
                }
            }
        }
        vocabulary.made = (0..vocabulary.tokens.len() as u32).collect();
        Ok(vocabulary.with_byte_ranks())
    }

    /// Hugging Face's rule: exactly these pairs of ids merge, earlier pairs first. `whole_pieces` is what
    /// `tokenizer.json` calls `ignore_merges`.
    pub fn with_merges(tokens: Vec<Vec<u8>>, merges: &[(u32, u32)], whole_pieces: bool) -> Result<Self, Error> {
        let mut vocabulary = Self::without_merges(tokens, whole_pieces)?;
        for (rank, &(left, right)) in merges.iter().enumerate() {
            let bytes = |id: u32| vocabulary.tokens.get(id as usize);
            let (Some(first), Some(second)) = (bytes(left), bytes(right)) else {
                return Err(Error::Vocabulary(format!(
                    "merge {rank} joins tokens {left} and {right}, but there are only {} tokens",
                    vocabulary.tokens.len()
                )));
            };
            let Some(id) = vocabulary.ids.get(&[&first[..], &second[..]].concat()) else {
                return Err(Error::Vocabulary(format!(
                    "merge {rank} joins tokens {left} and {right}, but the result is not a token"
                )));
            };
            vocabulary.ranks.insert(pair(left, right), rank as u32);
            vocabulary.made.push(id);
        }
        Ok(vocabulary.with_byte_ranks())
    }

    fn with_byte_ranks(mut self) -> Self {
        let pairs = self.bytes.iter().flat_map(|&left| self.bytes.iter().map(move |&right| (left, right)));
        self.byte_ranks = pairs.map(|(left, right)| self.rank(left, right)).collect();
        self
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
        let sizes = tokens.iter().map(|token| token.len() as u32).collect();
        let mut bytes = [0; 256];
        for byte in 0..=u8::MAX {
            bytes[usize::from(byte)] = ids
                .get(&[byte])
                .ok_or_else(|| Error::Vocabulary(format!("no token for the single byte 0x{byte:02x}")))?;
        }
        Ok(Self {
            tokens,
            sizes,
            ids,
            whole_pieces,
            bytes,
            byte_ranks: Vec::new(),
            ranks: HashMap::default(),
            made: Vec::new(),
        })
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

    /// Appends the ids of a piece: a single id if the piece is a token, otherwise its bytes merged lowest rank first,
    /// leftmost first in a tie. The time is linear in the length of the piece.
    pub fn encode_piece(&self, piece: &[u8], out: &mut Vec<u32>) {
        let whole = if self.whole_pieces { self.ids.get(piece) } else { None };
        if let Some(id) = whole {
            out.push(id);
        } else if piece.len() <= SHORT {
            self.merge_short(piece, out);
        } else {
            self.encode_long(piece, out);
        }
    }

    /// The rank of a merge; `NONE` if the two do not merge.
    fn rank(&self, left: u32, right: u32) -> u32 {
        self.ranks.get(&pair(left, right)).copied().unwrap_or(NONE)
    }

    fn byte_rank(&self, left: u8, right: u8) -> u32 {
        self.byte_ranks[usize::from(left) << 8 | usize::from(right)]
    }

    /// Merges a piece of at most `SHORT` bytes, scanning all pairs for each merge.
    fn merge_short(&self, piece: &[u8], out: &mut Vec<u32>) {
        // A symbol's id in the low half, and the rank of its merge with the next symbol in the high half.
        let mut symbols = [0; SHORT];
        let symbol = |id: u32, rank: u32| u64::from(rank) << 32 | u64::from(id);
        let mut length = piece.len();
        for at in 0..length {
            let rank = piece.get(at + 1).map_or(NONE, |&next| self.byte_rank(piece[at], next));
            symbols[at] = symbol(self.bytes[usize::from(piece[at])], rank);
        }
        loop {
            let (mut at, mut best) = (0, NONE);
            for (index, &symbol) in symbols[..length].iter().enumerate() {
                let rank = (symbol >> 32) as u32;
                if rank < best {
                    (at, best) = (index, rank);
                }
            }
            if best == NONE {
                break;
            }
            let id = self.made[best as usize];
            symbols.copy_within(at + 2..length, at + 1);
            length -= 1;
            symbols[at] = symbol(id, if at + 1 < length { self.rank(id, symbols[at + 1] as u32) } else { NONE });
            if at > 0 {
                let before = symbols[at - 1] as u32;
                symbols[at - 1] = symbol(before, self.rank(before, id));
            }
        }
        out.extend(symbols[..length].iter().map(|&symbol| symbol as u32));
    }

    /// Encodes a long piece window by window, so that the time grows no faster than the piece.
    ///
    /// A sequence of tokens is the encoding of its bytes if every two neighbouring tokens are the encoding of theirs:
    /// as long as no merge has crossed a boundary between tokens, the merges within two neighbours happen in the order
    /// in which they would happen without the rest, and none of those crosses the boundary between the two. Neighbours
    /// in the encoding of a window have this property. So one window may continue another if it begins with a token
    /// that the other has in the same place.
    fn encode_long(&self, piece: &[u8], out: &mut Vec<u32>) {
        let first = out.len();
        let mut at = 0;
        let mut size = SHORT;
        // The number of windows since the size changed, and of successful ones before a smaller size is tried.
        let (mut since, mut patience) = (0, 1);
        // The token of the last window at `at`.
        let mut expected = None;
        let mut window: &[u8] = &[];
        let mut ids = Vec::new();
        loop {
            let is_last = at + size >= piece.len();
            let next = &piece[at..piece.len().min(at + size)];
            // Such a long piece is often a run of one character, whose windows are all equal.
            if next != window {
                window = next;
                ids.clear();
                if next.len() <= SHORT {
                    self.merge_short(next, &mut ids)
                } else {
                    self.merge_with_heap(next, &mut ids)
                }
            }
            if expected.is_some_and(|token| ids[0] != token) {
                // The end of the last window was too near. Encode its last token again, with more text after it. If a
                // smaller window fails at once, it was tried too early.
                patience = if since <= 2 { 2 * patience } else { 1 };
                (size, since) = (2 * size, 0);
                expected = if out.len() > first { out.pop() } else { None };
                at -= expected.map_or(0, |token| self.sizes[token as usize] as usize);
                continue;
            }
            if is_last {
                out.append(&mut ids);
                return;
            }
            let (mut kept, mut end) = (0, 0);
            while kept + 1 < ids.len() {
                let longer = end + self.sizes[ids[kept] as usize] as usize;
                if longer > size - size / MARGIN {
                    break;
                }
                (kept, end) = (kept + 1, longer);
            }
            out.extend_from_slice(&ids[..kept]);
            at += end;
            expected = Some(ids[kept]);
            since += 1;
            if kept == 0 {
                patience = if since <= 2 { 2 * patience } else { 1 };
                (size, since) = (2 * size, 0);
            } else if size > SHORT && since >= patience {
                (size, since) = (size / 2, 0);
            }
        }
    }

    /// Merges with a heap of possible merges over a linked list of symbols, each identified by its first byte's place.
    fn merge_with_heap(&self, piece: &[u8], out: &mut Vec<u32>) {
        let size = piece.len();
        let mut ids: Vec<u32> = piece.iter().map(|&byte| self.bytes[usize::from(byte)]).collect();
        let mut next: Vec<usize> = (1..=size).collect();
        let mut previous: Vec<usize> = (0..size).map(|at| at.wrapping_sub(1)).collect();
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> = BinaryHeap::with_capacity(size);
        for at in 1..size {
            let rank = self.byte_rank(piece[at - 1], piece[at]);
            if rank != NONE {
                heap.push(Reverse((rank, at - 1)));
            }
        }
        while let Some(Reverse((rank, at))) = heap.pop() {
            let right = next[at];
            // The symbols may have changed since; a symbol that is gone has the id NONE, which merges with nothing.
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

    /// The 256 bytes in reverse order, followed by some tokens.
    fn vocabulary(extra: &[&str]) -> Vocabulary {
        let bytes = (0..=u8::MAX).rev().map(|byte| vec![byte]);
        Vocabulary::new(bytes.chain(extra.iter().map(|token| token.as_bytes().to_vec())).collect()).unwrap()
    }

    /// tiktoken's definition: while two neighbours form a token, merge those that form the lowest, leftmost first.
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
                vocabulary.merge_with_heap(piece.as_bytes(), &mut long);
                prop_assert_eq!(&long, &expected);
            }
        }

        /// Few letters and long tokens, so that one end of a window affects tokens far away from it.
        #[test]
        fn windows_equal_the_reference(
            extra in prop::collection::btree_set("[ab]{2,5}|a{2,70}|(ab){2,30}|[abc]{2,12}", 0..40),
            ranks in any::<prop::sample::Index>(),
            parts in prop::collection::vec(("[abc]{1,30}|ab?|a", 1usize..40), 1..12),
        ) {
            let mut extra: Vec<&str> = extra.iter().map(String::as_str).collect();
            let first = ranks.index(extra.len().max(1));
            extra.rotate_left(first);
            let vocabulary = vocabulary(&extra);
            let piece: String = parts.iter().map(|(part, times)| part.repeat(*times)).collect();
            let (mut windows, mut heap) = (Vec::new(), Vec::new());
            vocabulary.encode_long(piece.as_bytes(), &mut windows);
            vocabulary.merge_with_heap(piece.as_bytes(), &mut heap);
            prop_assert_eq!(windows, heap);
        }
    }
}
