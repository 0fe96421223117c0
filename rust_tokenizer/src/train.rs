//! Byte-pair merges learnt from the counts of pieces.
//!
//! There is no map from pairs to their counts: every place of the text knows the pair that begins there, and the pairs
//! that a merge creates all contain the new symbol, so that their other symbol names them while the merge lasts.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::count::PieceCounts;
use crate::error::Error;

/// Between two pieces in the arena; not a symbol.
const BORDER: u32 = u32::MAX;
/// The pair at a place where none begins; the index of a pair that does not exist.
const NONE: u32 = u32::MAX;
const BYTES: usize = 256;

/// All distinct pieces, one after the other, a symbol at the place of its first byte.
struct Arena {
    symbols: Vec<u32>,
    /// Where the symbol starts whose last byte is here.
    starts: Vec<u32>,
    /// The pair that begins here.
    pairs: Vec<u32>,
    /// The index in `weights` of the piece that a place belongs to.
    piece_of: Vec<u32>,
    /// How often each piece occurs.
    weights: Vec<u64>,
}

impl Arena {
    fn new(counts: &PieceCounts) -> Result<Self, Error> {
        let mut size = 1usize;
        counts.for_each(|piece, _| size += piece.len() + 1);
        if size >= NONE as usize {
            return Err(Error::TooLarge);
        }
        let mut arena = Self {
            symbols: Vec::with_capacity(size),
            starts: (0..size as u32).collect(),
            pairs: vec![NONE; size],
            piece_of: Vec::with_capacity(size),
            weights: Vec::with_capacity(counts.distinct()),
        };
        arena.push_border(0);
        counts.for_each(|piece, count| {
            let index = arena.weights.len() as u32;
            arena.weights.push(count);
            arena.symbols.extend(piece.iter().map(|&byte| u32::from(byte)));
            arena.piece_of.resize(arena.symbols.len(), index);
            arena.push_border(index);
        });
        Ok(arena)
    }

    fn push_border(&mut self, index: u32) {
        self.symbols.push(BORDER);
        self.piece_of.push(index);
    }

    fn weight(&self, place: usize) -> u64 {
        self.weights[self.piece_of[place] as usize]
    }
}

/// The index of a pair, and its two ids.
type Born = (u32, (u32, u32));

/// A pair in the heap: its count, its ids, its index.
type Candidate = (u64, Reverse<(u32, u32)>, u32);

/// Pairs of neighbouring symbols by index.
#[derive(Default)]
struct Pairs {
    counts: Vec<u64>,
    /// Where each has ever begun, in ascending order. Places that have since lost the pair are skipped when read.
    places: Vec<Vec<u32>>,
    /// The highest count first, then the lowest pair of ids. A count here may be out of date, but never too low.
    heap: BinaryHeap<Candidate>,
}

impl Pairs {
    /// The pairs of bytes.
    fn new(arena: &mut Arena) -> Self {
        let mut pairs = Self::default();
        let mut table = vec![NONE; BYTES * BYTES];
        let mut born = Vec::new();
        for place in 1..arena.symbols.len() {
            let (left, right) = (arena.symbols[place - 1], arena.symbols[place]);
            if left != BORDER && right != BORDER {
                let slot = &mut table[left as usize * BYTES + right as usize];
                pairs.begin(arena, place - 1, slot, (left, right), &mut born);
            }
        }
        pairs.push_all(&mut born);
        pairs
    }

    /// Lets a pair begin at a place. `slot` holds its index; if it has none yet, it gets one and is noted in `born`.
    fn begin(&mut self, arena: &mut Arena, place: usize, slot: &mut u32, ids: (u32, u32), born: &mut Vec<Born>) {
        if *slot == NONE {
            *slot = self.counts.len() as u32;
            self.counts.push(0);
            self.places.push(Vec::new());
            born.push((*slot, ids));
        }
        self.counts[*slot as usize] += arena.weight(place);
        self.places[*slot as usize].push(place as u32);
        arena.pairs[place] = *slot;
    }

    fn push_all(&mut self, born: &mut Vec<Born>) {
        for (index, ids) in born.drain(..) {
            self.heap.push((self.counts[index as usize], Reverse(ids), index));
        }
    }

    /// The most frequent pair, ties to the lowest ids. None when no pair is left.
    fn pop(&mut self) -> Option<Born> {
        while let Some((count, Reverse(ids), index)) = self.heap.pop() {
            let current = self.counts[index as usize];
            if current == 0 {
                self.places[index as usize] = Vec::new();
            } else if current < count {
                self.heap.push((current, Reverse(ids), index));
            } else {
                return Some((index, ids));
            }
        }
        None
    }
}

/// Learns the tokens of a vocabulary of `size` (at least 256): the 256 bytes, then the merges in the order in which
/// they were made. Each step merges the pair of neighbours that occurs most often, ties to the lowest (left id, right
/// id), from left to right in every piece. Gives fewer tokens when no pair is left to merge.
///
/// `interrupted` is told now and then how many tokens there are; if it answers true, the training ends with
/// `Error::Interrupted`.
pub fn learn(
    counts: &PieceCounts,
    size: usize,
    mut interrupted: impl FnMut(usize) -> bool,
) -> Result<Vec<Vec<u8>>, Error> {
    let mut arena = Arena::new(counts)?;
    let mut pairs = Pairs::new(&mut arena);
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    // The indices of the pairs (symbol, new one) and (new one, symbol) while a merge lasts.
    let (mut before, mut behind) = (vec![NONE; BYTES], vec![NONE; BYTES]);
    let mut born = Vec::new();
    while tokens.len() < size {
        if tokens.len().is_multiple_of(256) && interrupted(tokens.len()) {
            return Err(Error::Interrupted);
        }
        let Some((index, (left, right))) = pairs.pop() else { break };
        let merged = tokens.len() as u32;
        let (left_size, right_size) = (tokens[left as usize].len(), tokens[right as usize].len());
        tokens.push([&tokens[left as usize][..], &tokens[right as usize][..]].concat());
        before.push(NONE);
        behind.push(NONE);
        for place in std::mem::take(&mut pairs.places[index as usize]) {
            let at = place as usize;
            // In `aaa` the second `aa` is gone once the first is merged.
            if arena.pairs[at] != index {
                continue;
            }
            let weight = arena.weight(at);
            let second = at + left_size;
            let after = second + right_size;
            arena.symbols[at] = merged;
            arena.starts[after - 1] = place;
            arena.pairs[at] = NONE;
            let start = arena.starts[at - 1] as usize;
            let (previous, next) = (arena.symbols[start], arena.symbols[after]);
            if previous != BORDER {
                pairs.counts[arena.pairs[start] as usize] -= weight;
                pairs.begin(&mut arena, start, &mut before[previous as usize], (previous, merged), &mut born);
            }
            if next != BORDER {
                pairs.counts[arena.pairs[second] as usize] -= weight;
                pairs.begin(&mut arena, at, &mut behind[next as usize], (merged, next), &mut born);
            }
            arena.pairs[second] = NONE;
        }
        pairs.counts[index as usize] = 0;
        for &(_, (left, right)) in &born {
            before[left as usize] = NONE;
            behind[right as usize] = NONE;
        }
        pairs.push_all(&mut born);
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::split::{DEFAULT_PATTERN, Splitter};

    fn learn_from(texts: &[&str], pattern: &str, size: usize) -> Vec<Vec<u8>> {
        let splitter = Splitter::new(pattern).unwrap();
        let mut counts = PieceCounts::default();
        for text in texts {
            counts.add_text(&splitter, text).unwrap();
        }
        learn(&counts, size, |_| false).unwrap()
    }

    /// All pairs counted again for each merge.
    fn reference(texts: &[&str], pattern: &str, size: usize) -> Vec<Vec<u8>> {
        let splitter = Splitter::new(pattern).unwrap();
        let mut pieces: Vec<Vec<u32>> = Vec::new();
        for text in texts {
            splitter.split(text, |start, end| pieces.push(text[start..end].bytes().map(u32::from).collect())).unwrap();
        }
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        while tokens.len() < size {
            let mut counts: BTreeMap<(u32, u32), u64> = BTreeMap::new();
            for pair in pieces.iter().flat_map(|piece| piece.windows(2)) {
                *counts.entry((pair[0], pair[1])).or_insert(0) += 1;
            }
            let Some((&(left, right), _)) = counts.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else {
                break;
            };
            let merged = tokens.len() as u32;
            tokens.push([tokens[left as usize].clone(), tokens[right as usize].clone()].concat());
            for piece in &mut pieces {
                let mut at = 0;
                while at + 1 < piece.len() {
                    if piece[at] == left && piece[at + 1] == right {
                        piece.splice(at..at + 2, [merged]);
                    }
                    at += 1;
                }
            }
        }
        tokens
    }

    #[test]
    fn ties_go_to_the_lowest_pair() {
        assert_eq!(learn_from(&["cd ab cd ab"], "[a-z]+", 258)[256..], [b"ab".to_vec(), b"cd".to_vec()]);
    }

    #[test]
    fn ends_when_nothing_is_left() {
        assert_eq!(learn_from(&["aaa"], "[a-z]+", 999).len(), 258);
        assert_eq!(learn_from(&[""], "[a-z]+", 999).len(), 256);
    }

    #[test]
    fn stops_when_interrupted() {
        assert_eq!(learn(&PieceCounts::default(), 999, |_| true), Err(Error::Interrupted));
    }

    #[test]
    fn a_long_piece_takes_no_quadratic_time() {
        let mut state = 1u64;
        let letters = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'a' + (state >> 59) as u8 % 26)
        });
        let text: String = letters.take(300_000).collect();
        assert_eq!(learn_from(&[&text], DEFAULT_PATTERN, 4096).len(), 4096);
    }

    proptest! {
        #[test]
        fn equals_the_reference(texts in prop::collection::vec("[abc \\né]{0,80}", 1..5), merges in 0usize..60) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            for pattern in [DEFAULT_PATTERN, "(?s).+"] {
                prop_assert_eq!(learn_from(&texts, pattern, 256 + merges), reference(&texts, pattern, 256 + merges));
            }
        }
    }
}
