//! Byte-pair merges learnt from the counts of pieces.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

use crate::count::PieceCounts;
use crate::error::Error;

/// Between two pieces in the arena: no pair contains it.
const BORDER: u32 = u32::MAX;
/// The place of a symbol that has become the right half of another.
const DEAD: u32 = u32::MAX - 1;

/// A pair of neighbouring symbols: how often it occurs, and where it has ever begun. Places that no longer hold the
/// pair stay in the list and are skipped when it is read.
#[derive(Default)]
struct Pair {
    count: u64,
    places: Vec<u32>,
}

/// All distinct pieces, one after the other, a symbol at the place of its first byte.
struct Arena {
    symbols: Vec<u32>,
    /// Where the symbol starts whose last byte is here.
    starts: Vec<u32>,
    /// The index in `weights` of the piece that a place belongs to.
    piece_of: Vec<u32>,
    /// How often each piece occurs.
    weights: Vec<u64>,
}

impl Arena {
    fn new(counts: &PieceCounts) -> Result<Self, Error> {
        let mut size = 1usize;
        counts.for_each(|piece, _| size += piece.len() + 1);
        if size >= DEAD as usize {
            return Err(Error::TooLarge);
        }
        let mut arena = Self {
            symbols: Vec::with_capacity(size),
            starts: (0..size as u32).collect(),
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
}

/// The pairs by their two symbols, and a heap of them by count.
struct Pairs {
    index: HashMap<u64, u32, FxBuildHasher>,
    pairs: Vec<Pair>,
    /// The highest count first, then the lowest pair of ids. A count here may be out of date, but never too low.
    heap: BinaryHeap<(u64, Reverse<u64>, u32)>,
}

/// Orders like the pair of ids.
fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Pairs {
    fn new(arena: &Arena) -> Self {
        let mut pairs = Self { index: HashMap::default(), pairs: Vec::new(), heap: BinaryHeap::new() };
        for (place, window) in arena.symbols.windows(2).enumerate() {
            if window[0] != BORDER && window[1] != BORDER {
                pairs.add(window[0], window[1], place as u32, arena.weights[arena.piece_of[place] as usize]);
            }
        }
        for (&key, &index) in &pairs.index {
            pairs.heap.push((pairs.pairs[index as usize].count, Reverse(key), index));
        }
        pairs
    }

    /// Counts one more place of a pair; true if the pair is new.
    fn add(&mut self, left: u32, right: u32, place: u32, weight: u64) -> bool {
        let next = self.pairs.len() as u32;
        let index = *self.index.entry(key(left, right)).or_insert(next);
        if index == next {
            self.pairs.push(Pair::default());
        }
        let pair = &mut self.pairs[index as usize];
        pair.count += weight;
        pair.places.push(place);
        index == next
    }

    fn remove(&mut self, left: u32, right: u32, weight: u64) {
        if let Some(&index) = self.index.get(&key(left, right)) {
            self.pairs[index as usize].count -= weight;
        }
    }

    /// The most frequent pair, ties to the lowest ids, and its places. None when no pair is left.
    fn pop(&mut self) -> Option<(u32, u32, Vec<u32>)> {
        while let Some((count, Reverse(key), index)) = self.heap.pop() {
            let pair = &mut self.pairs[index as usize];
            if pair.count == 0 {
                pair.places = Vec::new();
            } else if pair.count < count {
                self.heap.push((pair.count, Reverse(key), index));
            } else {
                return Some(((key >> 32) as u32, key as u32, std::mem::take(&mut pair.places)));
            }
        }
        None
    }
}

/// Learns the tokens of a vocabulary of `size` (at least 256): the 256 bytes, then the merges in the order in which
/// they were made. Each step merges the pair of neighbours that occurs most often, ties to the lowest (left id, right
/// id), from left to right in every piece. Gives fewer tokens when no pair is left to merge.
///
/// `interrupted` is asked now and then; if it answers true, the training ends with `Error::Interrupted`.
pub fn learn(counts: &PieceCounts, size: usize, mut interrupted: impl FnMut() -> bool) -> Result<Vec<Vec<u8>>, Error> {
    let mut arena = Arena::new(counts)?;
    let mut pairs = Pairs::new(&arena);
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    let mut born = Vec::new();
    while tokens.len() < size {
        if tokens.len().is_multiple_of(256) && interrupted() {
            return Err(Error::Interrupted);
        }
        let Some((left, right, places)) = pairs.pop() else { break };
        let merged = tokens.len() as u32;
        let (left_size, right_size) = (tokens[left as usize].len(), tokens[right as usize].len());
        tokens.push([&tokens[left as usize][..], &tokens[right as usize][..]].concat());
        for place in places {
            let at = place as usize;
            let second = at + left_size;
            // In `aaa` the second place of `aa` is gone once the first is merged.
            if arena.symbols[at] != left || arena.symbols[second] != right {
                continue;
            }
            let after = second + right_size;
            let (previous_start, next) = (arena.starts[at - 1], arena.symbols[after]);
            let previous = arena.symbols[previous_start as usize];
            let weight = arena.weights[arena.piece_of[at] as usize];
            pairs.remove(left, right, weight);
            if previous != BORDER {
                pairs.remove(previous, left, weight);
                if pairs.add(previous, merged, previous_start, weight) {
                    born.push(key(previous, merged));
                }
            }
            if next != BORDER {
                pairs.remove(right, next, weight);
                if pairs.add(merged, next, place, weight) {
                    born.push(key(merged, next));
                }
            }
            arena.symbols[at] = merged;
            arena.symbols[second] = DEAD;
            arena.starts[after - 1] = place;
        }
        for key in born.drain(..) {
            let index = pairs.index[&key];
            pairs.heap.push((pairs.pairs[index as usize].count, Reverse(key), index));
        }
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
        learn(&counts, size, || false).unwrap()
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
        assert_eq!(learn(&PieceCounts::default(), 999, || true), Err(Error::Interrupted));
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
