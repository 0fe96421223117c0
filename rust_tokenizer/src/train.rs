//! Byte-pair merges learnt from the counts of pieces.
//!
//! There is no map from pairs to their counts: every place of the text knows the pair that begins there, and the pairs
//! that a merge creates all contain the new symbol, so that their other symbol names them while the merge lasts. No
//! later merge creates them again: the places of a pair are all known when the merge that bore it is done.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::{BinaryHeap, HashMap};

use crate::count::PieceCounts;
use crate::error::Error;

/// Between two pieces in the arena; not a symbol.
const BORDER: u32 = u32::MAX;
/// The pair at a place where none begins; the index of a pair that does not exist.
const NONE: u32 = u32::MAX;
/// The weight of a place whose piece occurs more often than 32 bits can tell.
const HEAVY: u32 = u32::MAX;
const BYTES: usize = 256;
/// Places that are looked at together.
const BLOCK: usize = 256;

/// A byte of a piece. What a merge looks at lies together: it mostly waits for memory.
#[derive(Clone, Copy)]
struct Place {
    /// The symbol that starts or ends with this byte. Meaningless inside of a symbol.
    symbol: u32,
    /// The pair of symbols of which the first starts here.
    pair: u32,
    /// How often the piece occurs.
    weight: u32,
}

/// All distinct pieces, one after the other.
struct Arena {
    places: Vec<Place>,
    /// The weights of the places that are `HEAVY`.
    heavy: HashMap<u32, u64>,
}

impl Arena {
    fn new(counts: &PieceCounts) -> Result<Self, Error> {
        let mut size = 1usize;
        counts.for_each(|piece, _| size += piece.len() + 1);
        if size >= NONE as usize {
            return Err(Error::TooLarge);
        }
        let border = Place { symbol: BORDER, pair: NONE, weight: 0 };
        let mut arena = Self { places: Vec::with_capacity(size), heavy: HashMap::new() };
        arena.places.push(border);
        counts.for_each(|piece, count| {
            let weight = u32::try_from(count).unwrap_or(HEAVY);
            if weight == HEAVY {
                let start = arena.places.len();
                arena.heavy.extend((start..start + piece.len()).map(|place| (place as u32, count)));
            }
            arena.places.extend(piece.iter().map(|&byte| Place { symbol: byte.into(), pair: NONE, weight }));
            arena.places.push(border);
        });
        Ok(arena)
    }

    fn weight(&self, place: usize) -> u64 {
        match self.places[place].weight {
            HEAVY => self.heavy[&(place as u32)],
            weight => weight.into(),
        }
    }
}

/// A pair in the heap: its count, its ids, its index.
type Candidate = (u64, Reverse<(u32, u32)>, u32);

/// Pairs of neighbouring symbols by index.
#[derive(Default)]
struct Pairs {
    counts: Vec<u64>,
    /// Where the places of each end in `places`; they start where those of the one before it end.
    ends: Vec<usize>,
    /// Where each pair has ever begun, in ascending order. Places that have since lost the pair are skipped when read.
    places: Vec<u32>,
    /// The highest count first, then the lowest pair of ids. A count here may be out of date, but never too low.
    heap: BinaryHeap<Candidate>,
    /// The ids of the pairs that the present merge bears, which have the highest indices; the number of their places;
    /// and those places, each with the index of its pair.
    born: Vec<(u32, u32)>,
    sizes: Vec<usize>,
    begun: Vec<(u32, u32)>,
}

impl Pairs {
    /// The pairs of bytes.
    fn new(arena: &mut Arena) -> Self {
        let mut pairs = Self::default();
        let mut table = vec![NONE; BYTES * BYTES];
        for place in 1..arena.places.len() {
            let (left, right) = (arena.places[place - 1].symbol, arena.places[place].symbol);
            if left != BORDER && right != BORDER {
                let slot = &mut table[left as usize * BYTES + right as usize];
                pairs.begin(arena, place - 1, arena.weight(place - 1), slot, (left, right));
            }
        }
        pairs.close();
        pairs
    }

    /// Lets a pair begin at a place. `slot` holds its index; if it has none yet, it gets one.
    #[inline(always)]
    fn begin(&mut self, arena: &mut Arena, place: usize, weight: u64, slot: &mut u32, ids: (u32, u32)) {
        if *slot == NONE {
            *slot = self.counts.len() as u32;
            self.counts.push(0);
            self.born.push(ids);
            self.sizes.push(0);
        }
        let first = self.counts.len() - self.born.len();
        self.counts[*slot as usize] += weight;
        self.sizes[*slot as usize - first] += 1;
        self.begun.push((*slot, place as u32));
        arena.places[place].pair = *slot;
    }

    /// Ends a merge: files the places of the pairs that it bore, and makes them candidates.
    fn close(&mut self) {
        let first = self.counts.len() - self.born.len();
        let mut end = self.places.len();
        self.places.resize(end + self.begun.len(), 0);
        for (index, (ids, size)) in self.born.drain(..).zip(&mut self.sizes).enumerate() {
            self.heap.push((self.counts[first + index], Reverse(ids), (first + index) as u32));
            // From here on, where the next place of this pair is filed.
            let start = end;
            end += *size;
            *size = start;
        }
        for (index, place) in self.begun.drain(..) {
            let next = &mut self.sizes[index as usize - first];
            self.places[*next] = place;
            *next += 1;
        }
        self.ends.append(&mut self.sizes);
    }

    /// The most frequent pair, ties to the lowest ids, and its index. None when no pair is left.
    fn pop(&mut self) -> Option<((u32, u32), u32)> {
        while let Some(mut top) = self.heap.peek_mut() {
            let (count, Reverse(ids), index) = *top;
            let current = self.counts[index as usize];
            if current == 0 {
                PeekMut::pop(top);
            } else if current < count {
                top.0 = current;
            } else {
                PeekMut::pop(top);
                return Some((ids, index));
            }
        }
        None
    }

    /// Where the places of a pair lie in `places`.
    fn range(&self, index: u32) -> std::ops::Range<usize> {
        let index = index as usize;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        start..self.ends[index]
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
    let mut sizes = vec![1; BYTES];
    // The indices of the pairs (symbol, new one) and (new one, symbol) while a merge lasts.
    let (mut before, mut behind) = (vec![NONE; BYTES], vec![NONE; BYTES]);
    while tokens.len() < size {
        if tokens.len().is_multiple_of(256) && interrupted(tokens.len()) {
            return Err(Error::Interrupted);
        }
        let Some(((left, right), index)) = pairs.pop() else { break };
        let merged = tokens.len() as u32;
        let (left_size, right_size) = (sizes[left as usize], sizes[right as usize]);
        tokens.push([&tokens[left as usize][..], &tokens[right as usize][..]].concat());
        sizes.push(left_size + right_size);
        before.push(NONE);
        behind.push(NONE);
        let mut rest = pairs.range(index);
        while !rest.is_empty() {
            // A block of places is first looked at, without a branch, so that many accesses to memory are under way at
            // once; those that have lost the pair are dropped.
            let block = rest.start..rest.end.min(rest.start + BLOCK);
            rest.start = block.end;
            let mut present = [0; BLOCK];
            let mut number = 0;
            for &place in &pairs.places[block] {
                present[number] = place;
                number += usize::from(arena.places[place as usize].pair == index);
            }
            for &at in &present[..number] {
                let at = at as usize;
                // In `aaa` the second `aa` is gone once the first is merged.
                if arena.places[at].pair != index {
                    continue;
                }
                let weight = arena.weight(at);
                let second = at + left_size;
                let after = second + right_size;
                let (previous, next) = (arena.places[at - 1].symbol, arena.places[after].symbol);
                arena.places[at].symbol = merged;
                arena.places[at].pair = NONE;
                arena.places[after - 1].symbol = merged;
                if previous != BORDER {
                    let start = at - sizes[previous as usize];
                    pairs.counts[arena.places[start].pair as usize] -= weight;
                    pairs.begin(&mut arena, start, weight, &mut before[previous as usize], (previous, merged));
                }
                if next != BORDER {
                    pairs.counts[arena.places[second].pair as usize] -= weight;
                    pairs.begin(&mut arena, at, weight, &mut behind[next as usize], (merged, next));
                }
                arena.places[second].pair = NONE;
            }
        }
        pairs.counts[index as usize] = 0;
        for &(left, right) in &pairs.born {
            before[left as usize] = NONE;
            behind[right as usize] = NONE;
        }
        pairs.close();
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::count::Counter;
    use crate::split::{DEFAULT_PATTERN, Splitter};

    fn learn_from(texts: &[&str], pattern: &str, size: usize) -> Vec<Vec<u8>> {
        let splitter = Splitter::new(pattern).unwrap();
        let mut counts = Counter::default();
        for text in texts {
            counts.add_text(&splitter, text).unwrap();
        }
        learn(&counts.finish(), size, |_| false).unwrap()
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
